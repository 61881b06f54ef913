"""Extracts the text model of a multimodal checkpoint: its settings, and its tensors under the text model's names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from llamaclust.tools.convert.formats.checkpoint import Checkpoint
from llamaclust.tools.convert.lazy import Lazy
from llamaclust.tools.convert.settings import Settings

TEXT_PARTS: Final = {"Gemma3ForConditionalGeneration": "Gemma3ForCausalLM"}
NOTE: Final = "only the text model is written, without what sees pictures"

_DEFAULTS: Final[Mapping[str, Any]] = {
    "vocab_size": 262208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131072,
    "query_pre_attn_scalar": 256,
}
"""What the authors' configurations leave out of Gemma 3's text."""
_PREFIXES: Final = (
    ("language_model.model.", "model."),
    ("language_model.", ""),
    ("model.language_model.", "model."),
)
_PICTURES: Final = tuple(
    f"{root}{part}." for root in ("", "model.") for part in ("vision_tower", "multi_modal_projector")
)


def text_part(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint of the text model alone; the same one where it holds nothing else."""
    family = TEXT_PARTS.get(checkpoint.family)
    if family is None:
        return checkpoint
    inner = checkpoint.settings.inner("text_config")
    settings = Settings({**_DEFAULTS, **inner.values}, inner.origin)
    return replace(checkpoint, family=family, settings=settings, tensors=_text_tensors(checkpoint.tensors))


def _text_tensors(tensors: Mapping[str, Lazy]) -> dict[str, Lazy]:
    return {_name(name): tensor for name, tensor in tensors.items() if not name.startswith(_PICTURES)}


def _name(name: str) -> str:
    for prefix, other in _PREFIXES:
        if name.startswith(prefix):
            return other + name.removeprefix(prefix)
    return name

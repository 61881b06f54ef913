"""Extracts the text model of a multimodal checkpoint: settings, and tensors with the names of a text-only model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Final

from llamaclust.core.errors import ModelFileError
from llamaclust.model.checkpoints.settings import Settings
from llamaclust.model.gguf.values import shown
from llamaclust.tools.convert.settings import Checkpoint


@dataclass(frozen=True, slots=True)
class TextPart:
    """Describes the text model of a multimodal checkpoint. `families` maps a `model_type` to a Hugging Face class.
    `defaults` are values of settings that the configuration may lack."""

    families: Mapping[str, str]
    usual_type: str  # Default of the setting `model_type`.
    defaults: Mapping[str, Any] | None = None


_GEMMA3: Final = MappingProxyType(
    {
        "vocab_size": 262208,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 131072,
        "query_pre_attn_scalar": 256,
    }
)
_GEMMA3N: Final = MappingProxyType(
    {
        "vocab_size": 262400,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "hidden_size": 2048,
        "intermediate_size": 16384,
        "num_hidden_layers": 35,
        "max_position_embeddings": 32768,
    }
)
MULTIMODAL: Final[Mapping[str, TextPart]] = MappingProxyType(
    {
        "Gemma3ForConditionalGeneration": TextPart({"gemma3_text": "Gemma3ForCausalLM"}, "gemma3_text", _GEMMA3),
        "Gemma3nForConditionalGeneration": TextPart({"gemma3n_text": "Gemma3nForCausalLM"}, "gemma3n_text", _GEMMA3N),
        "Gemma4ForConditionalGeneration": TextPart({"gemma4_text": "Gemma4ForCausalLM"}, "gemma4_text"),
        "Qwen3_5ForConditionalGeneration": TextPart({"qwen3_5_text": "Qwen3_5ForCausalLM"}, "qwen3_5_text"),
        "Qwen3_5MoeForConditionalGeneration": TextPart(
            {"qwen3_5_moe_text": "Qwen3_5MoeForCausalLM"}, "qwen3_5_moe_text"
        ),
        "Qwen3VLForConditionalGeneration": TextPart({"qwen3_vl_text": "Qwen3VLForCausalLM"}, "qwen3_vl_text"),
        "Qwen3VLMoeForConditionalGeneration": TextPart(
            {"qwen3_vl_moe_text": "Qwen3VLMoeForCausalLM"}, "qwen3_vl_moe_text"
        ),
        "Llama4ForConditionalGeneration": TextPart({"llama4_text": "Llama4ForCausalLM"}, "llama4_text"),
        "Lfm2VlForConditionalGeneration": TextPart({"lfm2": "Lfm2ForCausalLM"}, "lfm2"),
        "Mistral3ForConditionalGeneration": TextPart(
            {
                "ministral3": "Ministral3ForCausalLM",
                "mistral": "Ministral3ForCausalLM",
                "mistral4": "Mistral4ForCausalLM",
            },
            "mistral",
        ),
    }
)
_PREFIXES: Final = (
    ("language_model.model.", "model."),
    ("language_model.", ""),
    ("model.mtp.", "mtp."),
    ("model.language_model.", "model."),
)
_PICTURES: Final = tuple(
    f"{root}{part}."
    for root in ("", "model.")
    for part in (
        "vision_tower",
        "vision_model",
        "multi_modal_projector",
        "visual",
        "embed_vision",
        "audio_tower",
        "embed_audio",
    )
)


def text_part(checkpoint: Checkpoint) -> Checkpoint:
    """Returns the text model of a multimodal checkpoint, or the given checkpoint if it is not multimodal. Raises
    ModelFileError if the kind of the text model is unknown."""
    part = MULTIMODAL.get(checkpoint.family)
    if part is None:
        return checkpoint
    inner = checkpoint.settings.inner("text_config")
    kind = inner.text("model_type", default=part.usual_type)
    if kind not in part.families:
        known = ", ".join(part.families)
        raise inner.error(
            "model_type", f"{shown(kind)} in a {checkpoint.family} cannot be converted; supported: {known}"
        )
    values = {**(part.defaults or {}), **inner.values}
    values.pop("tie_word_embeddings", None)  # If the checkpoint has a head, the head is used.
    added = checkpoint.settings.inner("vision_config").values.get("deepstack_visual_indexes")
    if isinstance(added, list):
        values["deepstack_layers"] = len(added)
    settings = Settings(values, inner.origin)
    tensors = {name: checkpoint.tensors[source] for name, source in _sources(checkpoint).items()}
    return replace(checkpoint, family=part.families[kind], settings=settings, tensors=tensors)


def _sources(checkpoint: Checkpoint) -> Mapping[str, str]:
    sources: dict[str, str] = {}
    for source in checkpoint.tensors:
        if source.startswith(_PICTURES):
            continue
        name = _name(source)
        if name in sources:
            both = f"{shown(sources[name])} and {shown(source)}"
            raise ModelFileError(
                f"{checkpoint.settings.origin}: tensors {both} both stand for {shown(name)}; remove one of them"
            )
        sources[name] = source
    return sources


def _name(name: str) -> str:
    for prefix, other in _PREFIXES:
        if name.startswith(prefix):
            return other + name.removeprefix(prefix)
    return name

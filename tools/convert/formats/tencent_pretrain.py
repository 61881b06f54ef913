"""LLaMA saved by TencentPretrain: one PyTorch file, and a JSON configuration with its own key names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from llamaclust.core.errors import ModelFileError
from llamaclust.model.gguf.values import shown
from llamaclust.tools.convert.formats.source_files import SourceFiles, read_json
from llamaclust.tools.convert.lazy import Lazy
from llamaclust.tools.convert.settings import MAX_CONTEXT, MAX_HEADS, MAX_LAYERS, Checkpoint, Settings

_EMBEDDING: Final = "embedding.word.embedding.weight"
_ENDS: Final = {
    _EMBEDDING: "tok_embeddings.weight",
    "encoder.layer_norm.weight": "norm.weight",
    "target.lm.output_layer.weight": "output.weight",
}
_LAYER: Final = re.compile(r"encoder\.transformer\.(\d+)\.(.*)\.weight")
_PARTS: Final = {
    "self_attn.linear_layers.0": "attention.wq",
    "self_attn.linear_layers.1": "attention.wk",
    "self_attn.linear_layers.2": "attention.wv",
    "self_attn.final_linear": "attention.wo",
    "feed_forward.linear_gate": "feed_forward.w1",
    "feed_forward.linear_1": "feed_forward.w3",
    "feed_forward.linear_2": "feed_forward.w2",
    "layer_norm_1": "attention_norm",
    "layer_norm_2": "ffn_norm",
}
_MUST_BE: Final = {
    "rotary_position_embedding": True,
    "feed_forward": "gated",
    "layernorm": "rms",
    "layernorm_positioning": "pre",
    "hidden_act": "silu",
}


def is_tencent_pretrain(tensors: Mapping[str, Lazy]) -> bool:
    return _EMBEDDING in tensors and any(_LAYER.fullmatch(name) for name in tensors)


def read_tencent_pretrain(
    files: SourceFiles, path: Path, tensors: Mapping[str, Lazy], config: Path | None, context_length: int | None
) -> Checkpoint:
    """`config` is its configuration, in TencentPretrain's words (models/llama/7b_config.json there)."""
    place = config or path.with_suffix(".json")
    if not place.is_file():
        raise ModelFileError(f"{path}: how many heads it has is not in it: name its configuration with --config")
    said = Settings(read_json(place), str(place))
    for name, wanted in _MUST_BE.items():
        if said.values.get(name, wanted) != wanted:
            raise said.error(name, f"{said.values[name]!r}; LLaMA has {wanted!r}, other models are not supported")
    renamed = {_meta_name(name, path): tensor for name, tensor in tensors.items()}
    values = _settings(said, renamed, path, context_length)
    return Checkpoint("Meta", Settings(values, str(place)), renamed, path.with_name("tokenizer.model"), path.stem)


def _meta_name(name: str, path: Path) -> str:
    if name in _ENDS:
        return _ENDS[name]
    found = _LAYER.fullmatch(name)
    if found is None or found[2] not in _PARTS:
        raise ModelFileError(f"{path}: tensor {shown(name)}: no part of LLaMA as TencentPretrain names it")
    return f"layers.{int(found[1])}.{_PARTS[found[2]]}.weight"


def _settings(said: Settings, tensors: Mapping[str, Lazy], path: Path, context_length: int | None) -> dict[str, Any]:
    """In Hugging Face's words; heads of K and V follow from their rows."""
    width, heads = said.count("hidden_size", "emb_size"), said.count("heads_num", maximum=MAX_HEADS)
    key = tensors.get("layers.0.attention.wk.weight")
    if key is None:
        raise ModelFileError(f"{path}: no keys of the first layer")
    head = max(1, width // heads)
    return {
        "hidden_size": width,
        "intermediate_size": said.count("feedforward_size"),
        "num_hidden_layers": said.count("layers_num", maximum=MAX_LAYERS),
        "num_attention_heads": heads,
        "num_key_value_heads": key.shape[0] // head,
        "vocab_size": tensors["tok_embeddings.weight"].shape[0],
        "max_position_embeddings": context_length or said.count("max_seq_length", default=2048, maximum=MAX_CONTEXT),
        "rms_norm_eps": said.real("layernorm_eps", "rms_norm_eps", default=1e-6, minimum=1e-12, maximum=0.1),
        "rope_theta": said.real("rope_theta", default=10000.0, minimum=1.0),
    }

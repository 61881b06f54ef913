"""Maps module names of Hugging Face models to the GGUF names of the layers' matrices."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

QKV: Final = MappingProxyType({"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj"})
_ATTENTION: Final = {**{module: f"attn_{part}" for part, module in QKV.items()}, "self_attn.o_proj": "attn_output"}
_FUSED: Final = {"mlp.gate_up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
_DECODER: Final = {
    **_ATTENTION,
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_GLM: Final = {**_ATTENTION, **_FUSED}
_GPT2: Final = {
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
_MATRICES: Final[Mapping[str, Mapping[str, str]]] = MappingProxyType(
    {
        "chatglm": _GLM,
        "cohere2": _DECODER,
        "ernie4_5": _DECODER,
        "ernie4_5-moe": _ATTENTION,
        "exaone4": _DECODER,
        "gemma": _DECODER,
        "gemma2": _DECODER,
        "gemma3": _DECODER,
        "gemma3n": _DECODER,
        "gemma4": _DECODER,
        "glm4": _GLM,
        "glm4moe": _ATTENTION,
        "gpt-oss": _ATTENTION,
        "gpt2": _GPT2,
        "granite": _DECODER,
        "granitemoe": _ATTENTION,
        "hunyuan-dense": _DECODER,
        "hunyuan-moe": _ATTENTION,
        "llama": _DECODER,
        "minimax-m2": _ATTENTION,
        "mistral3": _DECODER,
        "olmo2": _DECODER,
        "phi3": {"self_attn.qkv_proj": "attn_qkv", "self_attn.o_proj": "attn_output", **_FUSED},
        "qwen2": _DECODER,
        "qwen2moe": _ATTENTION,
        "qwen3": _DECODER,
        "qwen35": _DECODER,
        "qwen35moe": _ATTENTION,
        "qwen3moe": _ATTENTION,
        "qwen3next": _ATTENTION,
        "seed_oss": _DECODER,
        "smollm3": _DECODER,
        "starcoder2": {**_ATTENTION, "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"},
    }
)
"""Matrix names by architecture and module."""
PAIRED: Final = frozenset({"granite", "granitehybrid", "granitemoe", "llama", "mistral3", "smollm3"})
"""Architectures whose GGUF files interleave the two halves of each head's rows in Q and K."""
_MODULE: Final = re.compile(
    r"(model\.|transformer\.|language_model\.model\.|model\.language_model\.)?(layers|h)\.(?P<layer>\d{1,4})\.(?P<module>.+)"
)


def matrix_name(architecture: str, module: str) -> str | None:
    """Returns a matrix's GGUF name (`blk.7.attn_q` for `model.layers.7.self_attn.q_proj`), or None if it is unknown."""
    found = _MODULE.fullmatch(module)
    name = None if found is None else _MATRICES.get(architecture, {}).get(found["module"])
    return None if found is None or name is None else f"blk.{int(found['layer'])}.{name}"

"""Small random models of Llama 4 and Qwen 3 VL, the text models of multimodal families."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

import numpy as np

from llamaclust.model.gguf.writer import WritableValue
from support.models.tiny.shape import Tiny

_SCOUT = Tiny(
    "llama4",
    layers=5,
    experts=6,
    used=2,
    shared_ffn=96,
    shared_gate=False,
    expert_period=2,
    factors=("rope_freqs",),
    keys={"interleave_moe_layer_step": 2},
)

_QWEN3_VL: dict[str, WritableValue] = {
    "rope.dimension_sections": np.array([6, 5, 5, 0], np.int32),
    "n_deepstack_layers": 2,
    "rope.freq_base": 5e6,
}

TEXT_MODELS = MappingProxyType(
    {
        "qwen3vl": Tiny("qwen3vl", head_dim=32, head_norms=True, tied=True, keys=_QWEN3_VL),
        "qwen3vlmoe": Tiny("qwen3vlmoe", head_dim=32, head_norms=True, experts=6, keys=_QWEN3_VL),
        "llama4": _SCOUT,
        "llama4-maverick": Tiny(
            "llama4",
            hidden=32,
            layers=4,
            heads=2,
            kv_heads=1,
            ffn=32,
            experts=128,
            used=1,
            shared_ffn=32,
            shared_gate=False,
            expert_period=2,
            keys={"interleave_moe_layer_step": 2},
        ),
    }
)

LONG_TOKENS = [3 + 41 * at * at % 317 for at in range(8216)]
LONG_RECORDED = slice(8176, 8216)
"""Positions with recorded logits: they surround the first chunk border, where query scaling begins as well."""
LONG_LLAMA4 = replace(
    _SCOUT,
    hidden=32,
    heads=2,
    kv_heads=1,
    ffn=32,
    shared_ffn=32,
    context=8448,
    keys={**_SCOUT.keys, "context_length": 8448},
)
"""A model whose context is longer than a chunk."""
SHORT_CHUNKS = replace(_SCOUT, keys={**_SCOUT.keys, "attention.sliding_window": 6})
"""A model with shorter chunks than llama.cpp's 8192."""

"""Models with a gated delta net in place of attention in most layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from llamaclust.model.gguf.writer import WritableValue
from support.models.tiny.delta_net import DeltaNet, KimiDelta
from support.models.tiny.latent import Latent
from support.models.tiny.shape import Tiny

_QWEN: dict[str, Any] = {
    "layers": 5,
    "convolutions": (0, 2, 4),
    "gated": True,
    "head_norms": True,
    "norms": ("attn_norm", "post_attention_norm"),
}
_EXPERTS: dict[str, Any] = {"experts": 6, "shared_ffn": 80}
_KEYS: dict[str, WritableValue] = {"full_attention_interval": 2, "rope.dimension_count": 8}
_SECTIONS: dict[str, WritableValue] = {"rope.dimension_sections": np.array([2, 1, 1, 0], np.int32)}

DELTA_MODELS: Mapping[str, Tiny] = {
    "kimi-linear": Tiny(
        "kimi-linear",
        layers=5,
        convolutions=(0, 1, 3, 4),
        delta=KimiDelta(),
        latent=Latent(),
        experts=8,
        shared_ffn=96,
        shared_gate=False,
        selection_bias=True,
        dense=1,
        keys={
            "attention.head_count_kv": np.array([0, 0, 1, 0, 0], np.int32),
            "expert_shared_count": 1,
            "leading_dense_block_count": 1,
            "expert_weights_scale": 2.5,
            "expert_gating_func": 2,
        },
    ),
    "qwen3next": Tiny("qwen3next", delta=DeltaNet(joined=True), **_QWEN, **_EXPERTS, keys=_KEYS),
    "qwen3next-old": Tiny("qwen3next", delta=DeltaNet(heads=6, joined=True, old=True), **_QWEN, **_EXPERTS, keys=_KEYS),
    "qwen35": Tiny("qwen35", delta=DeltaNet(), **_QWEN, tied=True, keys=_KEYS | _SECTIONS),
    "qwen35moe": Tiny(
        "qwen35moe",
        delta=DeltaNet(heads=4, key_heads=1, dim=48, taps=3),
        **_QWEN,
        **_EXPERTS,
        keys=_KEYS | _SECTIONS,
    ),
}

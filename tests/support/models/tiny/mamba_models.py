"""Small random models with Mamba 2 in most layers, beside attention, or in single-block layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from llamaclust.model.gguf.writer import WritableValue
from support.models.tiny.mamba import Mamba
from support.models.tiny.shape import Tiny


def _per_layer(value: int, layers: tuple[int, ...], count: int) -> WritableValue:
    return np.array([value if layer in layers else 0 for layer in range(count)], np.int32)


_GRANITE: dict[str, Any] = {"layers": 5, "tied": True, "mamba": Mamba((0, 1, 3), groups=2)}
_GRANITE_KEYS: dict[str, WritableValue] = {
    "attention.head_count_kv": _per_layer(2, (2, 4), 5),
    "embedding_scale": 3.0,
    "attention.scale": 0.125,
    "residual_scale": 0.5,
    "logit_scale": 4.0,
    "rope.scaling.finetuned": False,
}
_NEMOTRON = Tiny(
    "nemotron_h",
    layers=6,
    norms=("attn_norm",),
    single_blocks=(1, 5),
    plain=True,
    mamba=Mamba((0, 2, 4), groups=4, heads=16, state_size=24),
    keys={
        "attention.head_count_kv": _per_layer(2, (3,), 6),
        "feed_forward_length": _per_layer(96, (1, 5), 6),
        "attention.layer_norm_epsilon": 1e-5,
    },
)

_NEMOTRON_MOE = replace(
    _NEMOTRON,
    architecture="nemotron_h_moe",
    experts=8,
    selection_bias=True,
    shared_ffn=80,
    shared_gate=False,
    keys={**_NEMOTRON.keys, "expert_weights_norm": True, "expert_weights_scale": 2.5, "expert_shared_count": 1},
)

MAMBA_MODELS: Mapping[str, Tiny] = {
    "granitehybrid": Tiny("granitehybrid", **_GRANITE, keys=_GRANITE_KEYS),
    "granitehybrid-experts": Tiny(
        "granitehybrid",
        **_GRANITE,
        experts=6,
        shared_ffn=80,
        shared_gate=False,
        keys={**_GRANITE_KEYS, "rope.scaling.finetuned": True},
    ),
    "falcon-h1": Tiny(
        "falcon-h1",
        layers=4,
        head_dim=24,
        norms=("attn_norm",),
        attention_beside=True,
        mamba=Mamba((0, 1, 2, 3), inner=96, heads=4, groups=2, state_size=32, has_norm=False, bare_norm="ffn_norm"),
        keys={"rope.freq_base": 1e6},
    ),
    "falcon-h1-norm": Tiny(
        "falcon-h1",
        norms=("attn_norm",),
        attention_beside=True,
        mamba=Mamba((0, 1, 2), inner=96, heads=6, bare_norm="ffn_norm"),
    ),
    "nemotron_h": _NEMOTRON,
    "nemotron_h_moe": _NEMOTRON_MOE,
    "nemotron_h_moe-latent": replace(
        _NEMOTRON_MOE, expert_width=32, keys={**_NEMOTRON_MOE.keys, "moe_latent_size": 32, "expert_group_count": 1}
    ),
}

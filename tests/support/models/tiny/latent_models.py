"""Small models with latent attention; llama.cpp recognizes the one without `query_rank` by its 27 layers."""

from __future__ import annotations

from typing import Any

from llamaclust.model.gguf.writer import WritableValue
from support.models.tiny.latent import Latent
from support.models.tiny.shape import Tiny

_DEEPSEEK: dict[str, Any] = {
    "experts": 16,
    "used": 4,
    "shared_ffn": 96,
    "shared_gate": False,
    "dense": 1,
}
_DEEPSEEK_KEYS: dict[str, WritableValue] = {"expert_shared_count": 1, "leading_dense_block_count": 1}
_DEEPSEEK_YARN = _DEEPSEEK_KEYS | {
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 40.0,
    "rope.scaling.original_context_length": 16,
}

LATENT_MODELS = {
    "deepseek2": Tiny(
        "deepseek2",
        latent=Latent(query_rank=48),
        selection_bias=True,
        **_DEEPSEEK,
        keys=_DEEPSEEK_YARN
        | {
            "rope.scaling.yarn_log_multiplier": 0.1,
            "expert_weights_norm": True,
            "expert_weights_scale": 2.5,
            "expert_gating_func": 2,
            "expert_group_count": 4,
            "expert_group_used_count": 2,
        },
    ),
    "deepseek2-lite": Tiny(
        "deepseek2",
        layers=27,
        heads=2,
        latent=Latent(),
        **_DEEPSEEK | {"dense": 25},
        keys=_DEEPSEEK_YARN | {"rope.scaling.yarn_log_multiplier": 0.0707, "leading_dense_block_count": 25},
    ),
    "deepseek2-scaled": Tiny(
        "deepseek2",
        heads=16,
        latent=Latent(latent=96, rotated=16, plain=32, value=40, query_rank=64),
        **_DEEPSEEK,
        keys=_DEEPSEEK_YARN | {"attention.temperature_scale": 0.2, "attention.temperature_length": 8},
    ),
    "mistral4": Tiny(
        "mistral4",
        latent=Latent(query_rank=32),
        **_DEEPSEEK,
        keys=_DEEPSEEK_YARN | {"rope.scaling.yarn_log_multiplier": 0.05},
    ),
}

"""Models with latent attention and experts: deepseek2 (DeepSeek V2 and V3, Kimi K2, GLM-4.7-Flash) and mistral4."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from llamaclust.model.architectures.experts import read_experts
from llamaclust.model.architectures.latent.attention import LatentAttention, LatentVariant
from llamaclust.model.architectures.layers import ProgramBuilder
from llamaclust.model.architectures.positions import yarn_score_scale
from llamaclust.model.hyperparameters import RopeScaling
from llamaclust.model.model_keys import LATENT_KEYS
from llamaclust.model.steps.options import Gating

_MAX_WIDTH, _MAX_COUNT, _MAX_SCALE = 1 << 12, 1 << 10, 1e3
_GLM_FLASH_LAYERS, _GLM_FLASH_VOCABULARY = (47, 48), 154880


def deepseek2(builder: ProgramBuilder) -> None:
    """Builds DeepSeek 2. The first layers are dense. The others have shared experts and grouped experts. If the
    file has `yarn_log_multiplier`, YaRN scales attention scores but not cos and sin, as in the original code."""
    multiplier = _log_multiplier(builder)
    _latent_layers(builder, multiplier, 1.0 if multiplier else 0.0)


def mistral4(builder: ProgramBuilder) -> None:
    """Builds Mistral Small 4, which is DeepSeek 2, but `yarn_log_multiplier` also affects the scale of cos and sin."""
    multiplier = _log_multiplier(builder)
    _latent_layers(builder, multiplier, multiplier)


def _latent_layers(builder: ProgramBuilder, multiplier: float, table_multiplier: float) -> None:
    hp, keys = builder.hyperparameters, builder.keys
    variant = latent_variant(builder, multiplier, table_multiplier)
    shared = hp.expert_feed_forward_length * keys.count("expert_shared_count", 0, minimum=0, maximum=_MAX_COUNT)
    experts = read_experts(keys, hp, gating=_gating(builder), normalized=False, shared_width=shared)
    dense = keys.count("leading_dense_block_count", 0, minimum=0, maximum=_MAX_COUNT)
    for layer in builder.layers():
        attention = LatentAttention(builder, layer, hp.head_count, variant, builder.kv_type)
        builder.append(attention.steps(hp.embedding_length))
        if layer < dense:
            builder.feed_forward(layer)
        else:
            builder.experts(layer, experts)


def latent_variant(builder: ProgramBuilder, multiplier: float, table_multiplier: float) -> LatentVariant:
    hp, keys = builder.hyperparameters, builder.keys
    latent = keys.count("attention.kv_lora_rank", maximum=_MAX_WIDTH)
    query, value = (keys.count(key, maximum=_MAX_WIDTH) for key in LATENT_KEYS)
    rotated = hp.rope.dimension_count
    if hp.head_count_kv != 1 or hp.key_length != latent + rotated or rotated >= query:
        expected = f"1 KV head of {latent} + {rotated} channels and queries of more than {rotated}"
        what = f"expected {expected}, found {hp.head_count_kv} of {hp.key_length} and queries of {query}"
        raise keys.error("attention.key_length", what)
    rope = hp.rope
    if rope.scaling is RopeScaling.YARN:
        rope = replace(rope, log_multiplier=table_multiplier)
    temperature = keys.real("attention.temperature_scale", 0.0, minimum=0.0, maximum=_MAX_SCALE)
    length = keys.count("attention.temperature_length", 0, minimum=1 if temperature else 0, maximum=1 << 30)
    if hp.rms_epsilon is None:
        raise keys.error("attention.layer_norm_rms_epsilon", "missing")
    return LatentVariant(
        latent=latent,
        rotated=rotated,
        query=query,
        value=value,
        query_rank=_query_rank(builder),
        scale=yarn_score_scale(rope, multiplier, query),
        epsilon=hp.rms_epsilon,
        table=builder.rope_table(rope),
        temperature=(temperature, length) if temperature else None,
    )


def _query_rank(builder: ProgramBuilder) -> int:
    return builder.keys.count("attention.q_lora_rank", 0, minimum=0, maximum=1 << 16)


def _log_multiplier(builder: ProgramBuilder) -> float:
    """Returns YaRN's log multiplier. The file stores a tenth of it, as float32."""
    tenth = builder.keys.real("rope.scaling.yarn_log_multiplier", 0.0, minimum=0.0, maximum=_MAX_SCALE)
    return float(np.float32(tenth) / np.float32(0.1))


def _gating(builder: ProgramBuilder) -> Gating:
    """Returns the default gating function of experts. Recognizes GLM-4.7-Flash by its size, as llama.cpp does."""
    hp = builder.hyperparameters
    is_glm = hp.block_count in _GLM_FLASH_LAYERS and hp.vocabulary_size == _GLM_FLASH_VOCABULARY
    return Gating.SIGMOID if is_glm else Gating.SOFTMAX

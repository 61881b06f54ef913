"""Gemma: gemma, gemma2, gemma3, gemma-embedding. The token embedding is scaled, and its tensor is used for the head
too. The gate's activation is GELU. In GGUF files, norm weights already include the 1 that the original models add."""

from __future__ import annotations

import math
from dataclasses import replace

from llamaclust.model.architectures.encoder_layers import EncoderBuilder
from llamaclust.model.architectures.layers import AttentionVariant, HeadNorms, Norms, ProgramBuilder
from llamaclust.model.hyperparameters import Hyperparameters
from llamaclust.model.steps.options import ActivationFunction, RopeStyle

_GEMMA2_27B_LAYERS, _GEMMA3_27B_LAYERS = 46, 62
_MAX_CAP = 1e6


def gemma(builder: ProgramBuilder) -> None:
    table = builder.rope_table()
    for layer in builder.layers(math.sqrt(builder.hyperparameters.embedding_length)):
        builder.attention(layer, AttentionVariant(RopeStyle.NEOX, table))
        builder.feed_forward(layer, activation=ActivationFunction.GELU_TANH)


def gemma2(builder: ProgramBuilder) -> None:
    """Builds Gemma 2, with norms before and after blocks, soft caps, and a sliding window in every second layer."""
    hp, keys = builder.hyperparameters, builder.keys
    scale = _scale(hp, _GEMMA2_27B_LAYERS)
    cap = keys.real("attn_logit_softcapping", 50.0, minimum=1e-3, maximum=_MAX_CAP)
    final_cap = keys.real("final_logit_softcapping", 30.0, minimum=1e-3, maximum=_MAX_CAP)
    windowed = keys.windowed_layers(hp.block_count, 2)
    table = builder.rope_table()
    for layer in builder.layers(math.sqrt(hp.embedding_length), soft_cap=final_cap):
        window = (hp.sliding_window or 4096) if windowed[layer] else None
        variant = AttentionVariant(RopeStyle.NEOX, table, window, scale=scale, soft_cap=cap)
        _normed_layer(builder, layer, variant)


def gemma3(builder: ProgramBuilder) -> None:
    """Builds Gemma 3, text only. It is Gemma 2 with norms of q and k instead of soft caps. Five of six layers have a
    sliding window, and unscaled RoPE with another base."""
    hp = builder.hyperparameters
    final_cap = builder.keys.real("final_logit_softcapping", 0.0, minimum=0.0, maximum=_MAX_CAP)
    variants = _windowed_variants(builder, _scale(hp, _GEMMA3_27B_LAYERS))
    for layer in builder.layers(math.sqrt(hp.embedding_length), soft_cap=final_cap or None):
        _normed_layer(builder, layer, variants[layer])


def gemma_embedding(builder: EncoderBuilder) -> None:
    """Builds EmbeddingGemma: Gemma 3 as an encoder with dense layers. Sliding windows are centered on the token."""
    hp = builder.hyperparameters
    if hp.sliding_window is None:
        raise builder.keys.error("attention.sliding_window", "missing or 0, but the architecture has windows")
    variants = _windowed_variants(builder, 1 / math.sqrt(hp.key_length))
    for layer in builder.scaled_layers(math.sqrt(hp.embedding_length)):
        _normed_layer(builder, layer, replace(variants[layer], causal=False))


def _windowed_variants(builder: ProgramBuilder, scale: float) -> list[AttentionVariant]:
    hp = builder.hyperparameters
    windowed = builder.keys.windowed_layers(hp.block_count, 6) if hp.sliding_window else [False] * hp.block_count
    whole = AttentionVariant(RopeStyle.NEOX, builder.rope_table(), scale=scale, head_norms=HeadNorms.PER_HEAD)
    part = replace(whole, table=builder.window_rope_table(), window=hp.sliding_window)
    return [part if has_window else whole for has_window in windowed]


def _normed_layer(builder: ProgramBuilder, layer: int, variant: AttentionVariant) -> None:
    builder.attention(layer, variant, norms=Norms.BOTH)
    builder.feed_forward(layer, activation=ActivationFunction.GELU_TANH, norms=Norms.BOTH)


def _scale(hp: Hyperparameters, layers_27b: int) -> float:
    """Returns the factor by which attention scores are multiplied. In the 27B models, it is 1 / sqrt(width / heads).
    The file does not state this factor."""
    channels = hp.embedding_length // hp.head_count if hp.block_count == layers_27b else hp.key_length
    return 1 / math.sqrt(channels)

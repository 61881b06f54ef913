"""Gemma: gemma, gemma2, gemma3. The embedding is scaled and used again as the head; the gate is a GELU. Norm weights of
the model are relative to one, those of GGUF files are not."""

from __future__ import annotations

import math
from dataclasses import replace

from llamaclust.model.architectures.layers import AttentionVariant, ProgramBuilder
from llamaclust.model.hyperparameters import Hyperparameters, RopeScaling
from llamaclust.model.program import ActivationFunction, RopeStyle

_GEMMA2_27B_LAYERS, _GEMMA3_27B_LAYERS = 46, 62
_MAX_CAP = 1e6


def gemma(builder: ProgramBuilder) -> None:
    """Gemma 1."""
    table = builder.rope_table()
    for layer in builder.layers(math.sqrt(builder.hyperparameters.embedding_length)):
        builder.attention(layer, AttentionVariant(RopeStyle.NEOX, table))
        builder.feed_forward(layer, activation=ActivationFunction.GELU_TANH)


def gemma2(builder: ProgramBuilder) -> None:
    """Gemma 2: norms after attention and feed-forward too, soft caps, a sliding window in every other layer. What files
    leave out is as of the models that were published."""
    hp, keys = builder.hyperparameters, builder.keys
    scale = _scale(hp, _GEMMA2_27B_LAYERS)
    cap = keys.real("attn_logit_softcapping", 50.0, minimum=1e-3, maximum=_MAX_CAP)
    final_cap = keys.real("final_logit_softcapping", 30.0, minimum=1e-3, maximum=_MAX_CAP)
    windowed = keys.windowed_layers(hp.block_count, 2)
    table = builder.rope_table()
    for layer in builder.layers(math.sqrt(hp.embedding_length), soft_cap=final_cap):
        window = (hp.sliding_window or 4096) if windowed[layer] else None
        variant = AttentionVariant(RopeStyle.NEOX, table, window, scale=scale, soft_cap=cap)
        builder.attention(layer, variant, post_norm=True)
        builder.feed_forward(layer, activation=ActivationFunction.GELU_TANH, post_norm=True)


def gemma3(builder: ProgramBuilder) -> None:
    """Gemma 3, its text: as Gemma 2, with norms of q and k in place of the caps, and five windowed layers before one
    that sees everything. Windowed layers turn by a base of their own and without the scaling of the others."""
    hp, keys = builder.hyperparameters, builder.keys
    scale = _scale(hp, _GEMMA3_27B_LAYERS)
    windowed = keys.windowed_layers(hp.block_count, 6) if hp.sliding_window else [False] * hp.block_count
    local_base = keys.real("rope.freq_base_swa", 10000.0, minimum=1.0, maximum=1e12)
    local = replace(hp.rope, frequency_base=local_base, scaling=RopeScaling.NONE, factor=1.0)
    tables = {True: builder.rope_table(local), False: builder.rope_table()}
    final_cap = keys.real("final_logit_softcapping", 0.0, minimum=0.0, maximum=_MAX_CAP)
    for layer in builder.layers(math.sqrt(hp.embedding_length), soft_cap=final_cap or None):
        window = hp.sliding_window if windowed[layer] else None
        variant = AttentionVariant(RopeStyle.NEOX, tables[windowed[layer]], window, scale=scale, head_norms=True)
        builder.attention(layer, variant, post_norm=True)
        builder.feed_forward(layer, activation=ActivationFunction.GELU_TANH, post_norm=True)


def _scale(hp: Hyperparameters, layers_27b: int) -> float:
    """Of scores. The 27B models scale by their width's share of a head, which no key says."""
    channels = hp.embedding_length // hp.head_count if hp.block_count == layers_27b else hp.key_length
    return 1 / math.sqrt(channels)

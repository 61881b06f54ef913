"""gemma2: Gemma 2. Norms after attention and feed-forward too, soft caps, a sliding window in every other layer."""

from __future__ import annotations

import math

from llamaclust.model.architectures.layers import AttentionVariant, ProgramBuilder
from llamaclust.model.program import ActivationFunction, Program, RopeStyle

_LAYERS_27B = 46
_MAX_CAP = 1e6


def build(builder: ProgramBuilder) -> Program:
    """What files leave out is as of the models that were published. Gemma 2 27B scales scores by its width's share of a
    head, which no key says."""
    hp, keys = builder.hyperparameters, builder.keys
    channels = hp.embedding_length // hp.head_count if hp.block_count == _LAYERS_27B else hp.key_length
    cap = keys.real("attn_logit_softcapping", 50.0, minimum=1e-3, maximum=_MAX_CAP)
    windowed = keys.windowed_layers(hp.block_count, 2)
    table = builder.rope_table()
    builder.embed(math.sqrt(hp.embedding_length))
    for layer in range(builder.start, builder.end):
        builder.attention(
            layer,
            AttentionVariant(
                RopeStyle.NEOX,
                table,
                (hp.sliding_window or 4096) if windowed[layer] else None,
                scale=1 / math.sqrt(channels),
                soft_cap=cap,
            ),
            post_norm=True,
        )
        builder.feed_forward(layer, activation=ActivationFunction.GELU_TANH, post_norm=True)
    builder.head(keys.real("final_logit_softcapping", 30.0, minimum=1e-3, maximum=_MAX_CAP))
    return builder.program()

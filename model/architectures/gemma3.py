"""gemma3: Gemma 3, its text. As Gemma 2, with norms of q and k for the caps, and five windowed layers before one that
sees everything, whose rotation is another."""

from __future__ import annotations

import math
from dataclasses import replace

from llamaclust.model.architectures.layers import AttentionVariant, ProgramBuilder
from llamaclust.model.hyperparameters import RopeScaling
from llamaclust.model.program import ActivationFunction, Program, RopeStyle

_LAYERS_27B = 62


def build(builder: ProgramBuilder) -> Program:
    """Windowed layers turn by a base of their own and without the scaling of the others. Gemma 3 27B scales scores by
    its width's share of a head, which no key says."""
    hp, keys = builder.hyperparameters, builder.keys
    channels = hp.embedding_length // hp.head_count if hp.block_count == _LAYERS_27B else hp.key_length
    windowed = keys.windowed_layers(hp.block_count, 6) if hp.sliding_window else [False] * hp.block_count
    local_base = keys.real("rope.freq_base_swa", 10000.0, minimum=1.0, maximum=1e12)
    local = replace(hp.rope, frequency_base=local_base, scaling=RopeScaling.NONE, factor=1.0)
    tables = {True: builder.rope_table(local), False: builder.rope_table()}
    builder.embed(math.sqrt(hp.embedding_length))
    for layer in range(builder.start, builder.end):
        builder.attention(
            layer,
            AttentionVariant(
                RopeStyle.NEOX,
                tables[windowed[layer]],
                hp.sliding_window if windowed[layer] else None,
                scale=1 / math.sqrt(channels),
                head_norms=True,
            ),
            post_norm=True,
        )
        builder.feed_forward(layer, activation=ActivationFunction.GELU_TANH, post_norm=True)
    cap = keys.real("final_logit_softcapping", 0.0, minimum=0.0, maximum=1e6)
    builder.head(cap or None)
    return builder.program()

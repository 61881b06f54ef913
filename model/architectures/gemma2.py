"""gemma2: Gemma 2. Norms after attention and feed-forward too, soft caps, a sliding window in every other layer."""

from __future__ import annotations

import math

from llamaclust.model.architectures.layers import ProgramBuilder
from llamaclust.model.program import GeluKind, Program, RopeStyle

_LAYERS_27B = 46
_MAX_CAP = 1e6


def build(page: ProgramBuilder) -> Program:
    """What files leave out is as of the models that were published. Gemma 2 27B scales scores by its width's share of a
    head, which no key says."""
    hp, keys = page.hyperparameters, page.keys
    channels = hp.embedding_length // hp.head_count if hp.block_count == _LAYERS_27B else hp.key_length
    cap = keys.real("attn_logit_softcapping", 50.0, minimum=1e-3, maximum=_MAX_CAP)
    windowed = keys.windowed_layers(hp.block_count, 2)
    table = page.rope_table()
    page.embed(math.sqrt(hp.embedding_length))
    for layer in range(page.start, page.end):
        page.attention(
            layer,
            RopeStyle.NEOX,
            table,
            (hp.sliding_window or 4096) if windowed[layer] else None,
            scale=1 / math.sqrt(channels),
            soft_cap=cap,
            post_norm=True,
        )
        page.feed_forward(layer, gelu=GeluKind.TANH, post_norm=True)
    page.head(keys.real("final_logit_softcapping", 30.0, minimum=1e-3, maximum=_MAX_CAP))
    return page.program()

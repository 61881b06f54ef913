"""glm4: GLM-4-0414. As GLM 4 before, with norms after attention and feed-forward too."""

from __future__ import annotations

from llamaclust.model.architectures.layers import AttentionVariant, ProgramBuilder
from llamaclust.model.program import Program, RopeStyle


def build(builder: ProgramBuilder) -> Program:
    """How many channels of a head turn is `rope.dimension_count`, neighbouring ones together."""
    table = builder.rope_table()
    builder.embed()
    for layer in range(builder.start, builder.end):
        builder.attention(layer, AttentionVariant(RopeStyle.NORM, table), post_norm=True)
        builder.feed_forward(layer, fused=True, post_norm=True)
    builder.head()
    return builder.program()

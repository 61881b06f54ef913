"""chatglm: ChatGLM 2 and 3, GLM 4. q, k and v in one tensor with a bias, gate and up in one; half of a head turns."""

from __future__ import annotations

from llamaclust.model.architectures.layers import AttentionVariant, ProgramBuilder
from llamaclust.model.program import Program, RopeStyle


def build(builder: ProgramBuilder) -> Program:
    """How many channels of a head turn is `rope.dimension_count`, neighbouring ones together."""
    table = builder.rope_table()
    builder.embed()
    for layer in range(builder.start, builder.end):
        builder.attention(layer, AttentionVariant(RopeStyle.NORM, table))
        builder.feed_forward(layer, fused=True)
    builder.head()
    return builder.program()

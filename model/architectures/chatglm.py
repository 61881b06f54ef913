"""chatglm: ChatGLM 2 and 3, GLM 4. q, k and v in one tensor with a bias, gate and up in one; half of a head turns."""

from __future__ import annotations

from llamaclust.model.architectures.layers import ProgramBuilder
from llamaclust.model.program import Program, RopeStyle


def build(page: ProgramBuilder) -> Program:
    """How many channels of a head turn is `rope.dimension_count`, neighbouring ones together."""
    table = page.rope_table()
    page.embed()
    for layer in range(page.start, page.end):
        page.attention(layer, RopeStyle.NORM, table)
        page.feed_forward(layer, fused=True)
    page.head()
    return page.program()

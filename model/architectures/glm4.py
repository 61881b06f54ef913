"""glm4: GLM-4-0414. As GLM 4 before, with norms after attention and feed-forward too."""

from __future__ import annotations

from llamaclust.model.architectures.layers import ProgramBuilder
from llamaclust.model.program import Program, RopeStyle


def build(page: ProgramBuilder) -> Program:
    """How many channels of a head turn is `rope.dimension_count`, neighbouring ones together."""
    table = page.rope_table()
    page.embed()
    for layer in range(page.start, page.end):
        page.attention(layer, RopeStyle.NORM, table, post_norm=True)
        page.feed_forward(layer, fused=True, post_norm=True)
    page.head()
    return page.program()

"""qwen3: Qwen 3. Instead of biases, q and k are normed head by head before they are rotated."""

from __future__ import annotations

from llamaclust.model.architectures.layers import ProgramBuilder
from llamaclust.model.program import Program, RopeStyle


def build(page: ProgramBuilder) -> Program:
    """A head's width is the file's own and no part of the model's; a sliding window is not used, as of qwen2."""
    table = page.rope_table()
    page.embed()
    for layer in range(page.start, page.end):
        page.attention(layer, RopeStyle.NEOX, table, head_norms=True)
        page.feed_forward(layer)
    page.head()
    return page.program()

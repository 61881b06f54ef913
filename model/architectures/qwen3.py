"""qwen3: Qwen 3. Instead of biases, q and k are normed head by head before they are rotated."""

from __future__ import annotations

from llamaclust.model.architectures.layers import AttentionVariant, ProgramBuilder
from llamaclust.model.program import Program, RopeStyle


def build(builder: ProgramBuilder) -> Program:
    """A head's width is the file's own and no part of the model's; a sliding window is not used, as of qwen2."""
    table = builder.rope_table()
    builder.embed()
    for layer in range(builder.start, builder.end):
        builder.attention(layer, AttentionVariant(RopeStyle.NEOX, table, head_norms=True))
        builder.feed_forward(layer)
    builder.head()
    return builder.program()

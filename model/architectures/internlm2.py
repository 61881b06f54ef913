"""internlm2: InternLM 2 and 2.5, which are LLaMA with names of their own."""

from __future__ import annotations

from llamaclust.model.architectures.layers import AttentionVariant, ProgramBuilder
from llamaclust.model.program import Program, RopeStyle


def build(builder: ProgramBuilder) -> Program:
    """GGUF files hold q, k and v apart, their rows permuted for neighbouring pairs as those of LLaMA."""
    table = builder.rope_table()
    builder.embed()
    for layer in range(builder.start, builder.end):
        builder.attention(layer, AttentionVariant(RopeStyle.NORM, table))
        builder.feed_forward(layer)
    builder.head()
    return builder.program()

"""qwen3moe: Qwen 3 with experts in every layer."""

from __future__ import annotations

from llamaclust.model.architectures.layers import AttentionVariant, ProgramBuilder
from llamaclust.model.program import Program, RopeStyle


def build(builder: ProgramBuilder) -> Program:
    """The weights of the chosen experts are normalized (`norm_topk_prob` of all models of this kind)."""
    table = builder.rope_table()
    builder.embed()
    for layer in range(builder.start, builder.end):
        builder.attention(layer, AttentionVariant(RopeStyle.NEOX, table, head_norms=True))
        builder.experts(layer)
    builder.head()
    return builder.program()

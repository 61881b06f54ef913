"""qwen3moe: Qwen 3 with experts in every layer."""

from __future__ import annotations

from llamaclust.model.architectures.layers import ProgramBuilder
from llamaclust.model.program import Program, RopeStyle


def build(page: ProgramBuilder) -> Program:
    """The weights of the chosen experts are normalized (`norm_topk_prob` of all models of this kind)."""
    table = page.rope_table()
    page.embed()
    for layer in range(page.start, page.end):
        page.attention(layer, RopeStyle.NEOX, table, head_norms=True)
        page.experts(layer)
    page.head()
    return page.program()

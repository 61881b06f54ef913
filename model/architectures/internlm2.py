"""internlm2: InternLM 2 and 2.5, which are LLaMA with names of their own."""

from __future__ import annotations

from llamaclust.model.architectures.layers import ProgramBuilder
from llamaclust.model.program import Program, RopeStyle


def build(page: ProgramBuilder) -> Program:
    """GGUF files hold q, k and v apart, their rows permuted for neighbouring pairs as those of LLaMA."""
    table = page.rope_table()
    page.embed()
    for layer in range(page.start, page.end):
        page.attention(layer, RopeStyle.NORM, table)
        page.feed_forward(layer)
    page.head()
    return page.program()

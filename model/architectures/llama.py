"""llama: LLaMA 1 to 3.x, Mistral, Mixtral, SmolLM and everything else that GGUF files call by this name."""

from __future__ import annotations

from llamaclust.model.architectures.layers import ProgramBuilder
from llamaclust.model.program import Program, RopeStyle


def build(page: ProgramBuilder) -> Program:
    """GGUF files of this architecture have the rows of Q and K permuted for neighbouring pairs. A sliding window is
    obeyed: Mistral 7B v0.1 was trained with one, and no switch of that model's configuration turns it off."""
    table = page.rope_table()
    page.embed()
    for layer in range(page.start, page.end):
        page.attention(layer, RopeStyle.NORM, table, page.hyperparameters.sliding_window)
        if page.hyperparameters.expert_count:
            page.experts(layer)
        else:
            page.feed_forward(layer)
    page.head()
    return page.program()

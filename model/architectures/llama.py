"""llama: LLaMA 1 to 3.x, Mistral, Mixtral, SmolLM and everything else that GGUF files call by this name."""

from __future__ import annotations

from llamaclust.model.architectures.layers import AttentionVariant, ProgramBuilder
from llamaclust.model.program import Program, RopeStyle


def build(builder: ProgramBuilder) -> Program:
    """GGUF files of this architecture have the rows of Q and K permuted for neighbouring pairs. A sliding window is
    obeyed: Mistral 7B v0.1 was trained with one, and no switch of that model's configuration turns it off."""
    table = builder.rope_table()
    builder.embed()
    for layer in range(builder.start, builder.end):
        builder.attention(layer, AttentionVariant(RopeStyle.NORM, table, builder.hyperparameters.sliding_window))
        if builder.hyperparameters.expert_count:
            builder.experts(layer)
        else:
            builder.feed_forward(layer)
    builder.head()
    return builder.program()

"""qwen2: Qwen 2 and 2.5. LLaMA with biases on q, k and v, and pairs half a head apart."""

from __future__ import annotations

from llamaclust.model.architectures.layers import AttentionVariant, ProgramBuilder
from llamaclust.model.program import Program, RopeStyle


def build(builder: ProgramBuilder) -> Program:
    """A sliding window that the file names is not used: the models' configurations name one and switch it off
    (`use_sliding_window`), and GGUF has no key for the switch."""
    table = builder.rope_table()
    builder.embed()
    for layer in range(builder.start, builder.end):
        builder.require(layer, "attn_q.bias", "attn_k.bias", "attn_v.bias")
        builder.attention(layer, AttentionVariant(RopeStyle.NEOX, table))
        builder.feed_forward(layer)
    builder.head()
    return builder.program()

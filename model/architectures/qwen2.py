"""qwen2: Qwen 2 and 2.5. LLaMA with biases on q, k and v, and pairs half a head apart."""

from __future__ import annotations

from llamaclust.model.architectures.layers import ProgramBuilder
from llamaclust.model.program import Program, RopeStyle


def build(page: ProgramBuilder) -> Program:
    """A sliding window that the file names is not used: the models' configurations name one and switch it off
    (`use_sliding_window`), and GGUF has no key for the switch."""
    table = page.rope_table()
    page.embed()
    for layer in range(page.start, page.end):
        page.require(layer, "attn_q.bias", "attn_k.bias", "attn_v.bias")
        page.attention(layer, RopeStyle.NEOX, table)
        page.feed_forward(layer)
    page.head()
    return page.program()

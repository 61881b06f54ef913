"""gpt2: GPT 2. Learned positions instead of rotations, norms with a mean, biases everywhere, one plain inner layer."""

from __future__ import annotations

from llamaclust.model.architectures.layers import ProgramBuilder
from llamaclust.model.program import GeluKind, Program


def build(page: ProgramBuilder) -> Program:
    page.use_layer_norms()
    page.embed(positions=True)
    for layer in range(page.start, page.end):
        page.require(layer, "attn_qkv.bias", "attn_output.bias", "ffn_up.bias", "ffn_down.bias")
        page.attention(layer)
        page.plain_feed_forward(layer, GeluKind.TANH)
    page.head()
    return page.program()

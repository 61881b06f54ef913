"""gpt2: GPT 2. Learned positions instead of rotations, norms with a mean, biases everywhere, one plain inner layer."""

from __future__ import annotations

from llamaclust.model.architectures.layers import ProgramBuilder
from llamaclust.model.program import ActivationFunction, Program


def build(builder: ProgramBuilder) -> Program:
    builder.use_layer_norms()
    builder.embed(positions=True)
    for layer in range(builder.start, builder.end):
        builder.require(layer, "attn_qkv.bias", "attn_output.bias", "ffn_up.bias", "ffn_down.bias")
        builder.attention(layer)
        builder.plain_feed_forward(layer, ActivationFunction.GELU_TANH)
    builder.head()
    return builder.program()

"""starcoder2: StarCoder 2. Norms with a mean, biases, one plain inner layer, rotations of pairs half a head apart."""

from __future__ import annotations

from llamaclust.model.architectures.layers import AttentionVariant, ProgramBuilder
from llamaclust.model.program import ActivationFunction, Program, RopeStyle


def build(builder: ProgramBuilder) -> Program:
    """A sliding window is obeyed where the file names one: these models were trained with it."""
    table = builder.rope_table()
    builder.use_layer_norms()
    builder.embed()
    for layer in range(builder.start, builder.end):
        builder.attention(layer, AttentionVariant(RopeStyle.NEOX, table, builder.hyperparameters.sliding_window))
        builder.plain_feed_forward(layer, ActivationFunction.GELU_TANH)
    builder.head()
    return builder.program()

"""gemma: Gemma 1. The embedding is scaled and used again as the head; the gate is a GELU."""

from __future__ import annotations

import math

from llamaclust.model.architectures.layers import AttentionVariant, ProgramBuilder
from llamaclust.model.program import ActivationFunction, Program, RopeStyle


def build(builder: ProgramBuilder) -> Program:
    """Norm weights of the model are relative to one, those of GGUF files are not."""
    table = builder.rope_table()
    builder.embed(math.sqrt(builder.hyperparameters.embedding_length))
    for layer in range(builder.start, builder.end):
        builder.attention(layer, AttentionVariant(RopeStyle.NEOX, table))
        builder.feed_forward(layer, activation=ActivationFunction.GELU_TANH)
    builder.head()
    return builder.program()

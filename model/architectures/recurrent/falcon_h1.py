"""Falcon H1: falcon-h1. In each layer, attention and Mamba 2 are parallel. They read the same normed hidden state."""

from __future__ import annotations

from llamaclust.model.architectures.layers import AttentionVariant, ProgramBuilder
from llamaclust.model.architectures.recurrent.mamba import mamba, read_mamba_shape


def falcon_h1(builder: ProgramBuilder) -> None:
    shape = read_mamba_shape(builder.keys)
    attention = AttentionVariant(table=builder.rope_table())
    for layer in builder.layers():
        builder.attention(layer, attention)
        builder.mix(layer, mamba(builder, layer, shape, has_norm=False), beside=True)
        builder.feed_forward(layer)

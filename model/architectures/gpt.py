"""Architectures whose norms subtract the mean and whose feed-forward networks are ungated: gpt2, starcoder2, falcon."""

from __future__ import annotations

from llamaclust.model.architectures.layers import AttentionVariant, ProgramBuilder
from llamaclust.model.steps.options import ActivationFunction, RopeStyle


def gpt2(builder: ProgramBuilder) -> None:
    builder.use_layer_norms()
    for layer in builder.layers(positions=True):
        builder.require(layer, "attn_qkv.bias", "attn_output.bias", "ffn_up.bias", "ffn_down.bias")
        builder.attention(layer)
        builder.plain_feed_forward(layer, ActivationFunction.GELU_TANH)


def starcoder2(builder: ProgramBuilder) -> None:
    """Builds StarCoder 2, which has biases. A sliding window in the file is used, because the models were trained with
    one. RoPE pairs channels that are half a head apart."""
    table = builder.rope_table()
    builder.use_layer_norms()
    for layer in builder.layers():
        builder.attention(layer, AttentionVariant(RopeStyle.NEOX, table, builder.hyperparameters.sliding_window))
        builder.plain_feed_forward(layer, ActivationFunction.GELU_TANH)


def falcon(builder: ProgramBuilder) -> None:
    """Builds Falcon 7B, 40B and 180B. Attention and feed-forward network are parallel: both read the layer's input. In
    the larger models, attention has its own norm, `attn_norm_2`."""
    table = builder.rope_table()
    builder.use_layer_norms()
    for layer in builder.layers():
        builder.parallel(layer, AttentionVariant(RopeStyle.NEOX, table), ActivationFunction.GELU_TANH)

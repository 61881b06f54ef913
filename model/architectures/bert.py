"""Encoders whose norms stand behind the sums: bert, nomic-bert, jina-bert-v2. They make embeddings alone."""

from __future__ import annotations

from llamaclust.model.architectures.layers import AttentionVariant, ProgramBuilder
from llamaclust.model.architectures.positions import alibi_slopes
from llamaclust.model.program import ActivationFunction, RopeStyle


def bert(builder: ProgramBuilder) -> None:
    """BERT, and most sentence encoders since (MiniLM, BGE, E5, GTE): learned positions, biases everywhere."""
    builder.use_layer_norms()
    for layer in builder.encoder_layers(positions=True):
        builder.require(layer, "attn_q.bias", "attn_output.bias", "ffn_up.bias", "ffn_down.bias")
        variant = AttentionVariant(causal=False)
        builder.encode(layer, variant, gated=False, activation=ActivationFunction.GELU_ERF)


def nomic_bert(builder: ProgramBuilder) -> None:
    """Nomic Embed 1 and 1.5: rotations, one tensor of queries, keys and values, a gate."""
    table = builder.rope_table()
    builder.use_layer_norms()
    for layer in builder.encoder_layers():
        variant = AttentionVariant(RopeStyle.NEOX, table, causal=False)
        builder.encode(layer, variant, gated=True, activation=ActivationFunction.SILU)


def jina_bert_v2(builder: ProgramBuilder) -> None:
    """Jina Embeddings 2: a bias by distance instead of positions, a gate."""
    slopes = alibi_slopes(builder.hyperparameters.head_count)
    builder.use_layer_norms()
    for layer in builder.encoder_layers():
        variant = AttentionVariant(slopes=slopes, causal=False)
        builder.encode(layer, variant, gated=True, activation=ActivationFunction.GELU_ERF)

"""Encoders for embeddings. modern-bert has norms before its blocks. Other encoders have norms after their blocks."""

from __future__ import annotations

from dataclasses import replace

from llamaclust.model.architectures.encoder_layers import EncoderBuilder
from llamaclust.model.architectures.layers import AttentionVariant
from llamaclust.model.architectures.positions import alibi_slopes
from llamaclust.model.gguf.values import shown
from llamaclust.model.steps.options import ActivationFunction, RopeStyle

_ACTIVATIONS = {
    "gelu": ActivationFunction.GELU_ERF,
    "gelu_pytorch_tanh": ActivationFunction.GELU_TANH,
    "silu": ActivationFunction.SILU,
    "swish": ActivationFunction.SILU,
}


def bert(builder: EncoderBuilder) -> None:
    """Builds BERT and most later sentence encoders (MiniLM, BGE, E5, GTE), with learned positions and biases."""
    builder.use_layer_norms()
    for layer in builder.sentence_layers(positions=True):
        builder.require(layer, "attn_q.bias", "attn_output.bias", "ffn_up.bias", "ffn_down.bias")
        variant = AttentionVariant(causal=False)
        builder.encode(layer, variant, gated=False, activation=ActivationFunction.GELU_ERF)


def nomic_bert(builder: EncoderBuilder) -> None:
    """Builds Nomic Embed 1 and 1.5, with RoPE, one tensor for q, k and v, and a gated feed-forward network."""
    table = builder.rope_table()
    builder.use_layer_norms()
    for layer in builder.sentence_layers():
        variant = AttentionVariant(RopeStyle.NEOX, table, causal=False)
        builder.encode(layer, variant, gated=True, activation=ActivationFunction.SILU)


def nomic_bert_moe(builder: EncoderBuilder) -> None:
    """Builds Nomic Embed 2: XLM-RoBERTa with RoPE. Every `moe_every_n_layers`-th layer from layer 1 has experts."""
    table, every = builder.rope_table(), builder.keys.count("moe_every_n_layers", 0, minimum=0, maximum=1 << 10)
    builder.use_layer_norms()
    for layer in builder.sentence_layers():
        variant = AttentionVariant(RopeStyle.NEOX, table, causal=False)
        experts = every > 0 and layer % every == 1
        builder.encode(layer, variant, gated=False, activation=ActivationFunction.GELU_ERF, experts=experts)


def jina_bert_v2(builder: EncoderBuilder) -> None:
    """Builds Jina Embeddings 2, with ALiBi instead of position embeddings, and a gated feed-forward network."""
    slopes = alibi_slopes(builder.hyperparameters.head_count)
    builder.use_layer_norms()
    for layer in builder.sentence_layers():
        variant = AttentionVariant(slopes=slopes, causal=False)
        builder.encode(layer, variant, gated=True, activation=ActivationFunction.GELU_ERF)


def jina_bert_v3(builder: EncoderBuilder) -> None:
    """Builds Jina Embeddings 3: XLM-RoBERTa with RoPE, without learned positions. Its adapters are separate files."""
    table = builder.rope_table()
    builder.use_layer_norms()
    for layer in builder.sentence_layers():
        variant = AttentionVariant(RopeStyle.NEOX, table, causal=False)
        builder.encode(layer, variant, gated=False, activation=ActivationFunction.GELU_ERF)


def modern_bert(builder: EncoderBuilder) -> None:
    """Builds ModernBERT. The first layer and every third layer after it attend to all tokens. The other layers have a
    sliding window and another RoPE base."""
    hp, activation = builder.hyperparameters, _activation(builder)
    windowed = builder.keys.windowed_layers(hp.block_count, 3, full_first=True)
    whole = AttentionVariant(RopeStyle.NEOX, builder.rope_table(), causal=False)
    part = replace(whole, table=builder.window_rope_table(), window=hp.sliding_window) if hp.sliding_window else whole
    builder.use_layer_norms(biases=False)
    for layer in builder.sentence_layers(last_norm=True):
        variant = part if windowed[layer] else whole
        if layer > 0 or "blk.0.attn_norm.weight" in builder.model.tensors:
            builder.attention(layer, variant)
        else:
            builder.attention_without_norm(layer, variant)
        builder.feed_forward(layer, fused=True, activation=activation)


def _activation(builder: EncoderBuilder) -> ActivationFunction:
    key = "hidden_activation"
    name = builder.keys.text(key, "gelu")
    if name not in _ACTIVATIONS:
        raise builder.keys.error(key, f"{shown(name)} is not supported; supported are {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]

"""Nemotron H and Nemotron 3: nemotron_h, nemotron_h_moe. Each layer is one block. Layers with a feed-forward width have
a feed-forward network or experts. Other layers have attention if they have KV heads, and otherwise Mamba 2."""

from __future__ import annotations

from collections.abc import Iterator

from llamaclust.model import program as ir
from llamaclust.model.architectures.experts import ExpertsVariant, expert_step, read_experts
from llamaclust.model.architectures.layers import AttentionVariant, ProgramBuilder
from llamaclust.model.architectures.recurrent.mamba import mamba, read_mamba_shape
from llamaclust.model.program import Buffer
from llamaclust.model.steps.options import ActivationFunction, Gating

_MAX_WIDTH = 1 << 20


def nemotron_h(builder: ProgramBuilder) -> None:
    """Builds Nemotron H, without RoPE. Feed-forward networks and experts have no gates."""
    hp, keys = builder.hyperparameters, builder.keys
    shape, experts = read_mamba_shape(keys), None
    latent_width = keys.count("moe_latent_size", 0, minimum=0, maximum=_MAX_WIDTH)
    if hp.expert_count:
        shared = keys.count("expert_shared_feed_forward_length", maximum=_MAX_WIDTH)
        experts = read_experts(
            keys,
            hp,
            gating=Gating.SIGMOID,
            normalized=False,
            activation=ActivationFunction.RELU_SQUARED,
            shared_width=shared,
        )
    for layer in builder.layers():
        if hp.feed_forward_lengths[layer] and experts is not None:
            builder.require(layer, "exp_probs_b.bias")
            builder.mix(layer, _experts(builder, layer, experts, latent_width))
        elif hp.feed_forward_lengths[layer]:
            builder.plain_feed_forward(layer, ActivationFunction.RELU_SQUARED, norm="attn_norm")
        elif hp.head_counts_kv[layer]:
            builder.attention(layer, AttentionVariant())
        else:
            builder.mix(layer, mamba(builder, layer, shape))


def _experts(builder: ProgramBuilder, layer: int, variant: ExpertsVariant, latent_width: int) -> Iterator[ir.Step]:
    """Yields the steps that add the results of the chosen experts and of the shared expert. If `latent_width` is not 0,
    the chosen experts read and write vectors of this width."""
    prefix, hp = f"blk.{layer}", builder.hyperparameters
    normed, projected = (Buffer(name, hp.embedding_length) for name in ("normed", "projected"))
    if latent_width:
        latent, mixed = (Buffer(name, latent_width) for name in ("latent", "latent mixed"))
        yield builder.product(f"{prefix}.ffn_latent_down", normed, latent)
        yield expert_step(builder, prefix, hp, variant, (latent, mixed), routed=normed)
        yield builder.product(f"{prefix}.ffn_latent_up", mixed, projected)
    else:
        yield expert_step(builder, prefix, hp, variant, (normed, projected))
    up, shared = Buffer("shared up", variant.shared_width), Buffer("shared", hp.embedding_length)
    yield builder.product(f"{prefix}.ffn_up_shexp", normed, up)
    yield ir.Activate(up, up, ActivationFunction.RELU_SQUARED)
    yield builder.product(f"{prefix}.ffn_down_shexp", up, shared)
    yield ir.Add(projected, shared, projected)

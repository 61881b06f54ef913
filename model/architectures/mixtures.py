"""Mixtures of experts with leading dense layers or experts that every token uses: ernie4_5-moe, hunyuan-moe,
bailingmoe2, minimax-m2, glm4moe."""

from __future__ import annotations

from llamaclust.model.architectures.experts import read_experts
from llamaclust.model.architectures.layers import AttentionVariant, HeadNorms, ProgramBuilder
from llamaclust.model.step_options import Gating, RopeStyle

_MAX_WIDTH = 1 << 20
_MAX_COUNT = 1 << 10


def ernie4_5_moe(builder: ProgramBuilder) -> None:
    """ERNIE 4.5 with experts: a bias for the choice, shared experts in one network, leading dense layers, and behind
    them experts in every layer or every few."""
    keys = builder.keys
    step = keys.count("interleave_moe_layer_step", 1, maximum=_MAX_COUNT)
    experts = read_experts(keys, builder.hyperparameters, gating=Gating.SOFTMAX, shared_width=_shared_width(builder))
    table, dense = builder.rope_table(), _dense_layers(builder)
    for layer in builder.layers():
        builder.attention(layer, AttentionVariant(RopeStyle.NORM, table))
        if layer >= dense and (layer + 1) % step == 0:
            builder.experts(layer, experts)
        else:
            builder.feed_forward(layer)


def hunyuan_moe(builder: ProgramBuilder) -> None:
    """Hunyuan A13B: q and k are normed after the rotation, a shared expert in every layer."""
    hp, table = builder.hyperparameters, builder.rope_table()
    shared = _shared_width(builder) or hp.feed_forward_length
    experts = read_experts(builder.keys, hp, gating=Gating.SOFTMAX, shared_width=shared)
    for layer in builder.layers():
        builder.attention(layer, AttentionVariant(RopeStyle.NEOX, table, head_norms=HeadNorms.PER_HEAD_AFTER_ROPE))
        builder.experts(layer, experts)


def bailingmoe2(builder: ProgramBuilder) -> None:
    """Ling and Ring 2.0: sigmoid gates in groups, shared experts, leading dense layers."""
    hp, keys, table = builder.hyperparameters, builder.keys, builder.rope_table()
    shared = (_shared_width(builder) or hp.expert_feed_forward_length) * _shared_experts(builder)
    experts = read_experts(keys, hp, gating=Gating.SIGMOID, normalized=False, shared_width=shared)
    dense = _dense_layers(builder)
    for layer in builder.layers():
        builder.attention(layer, AttentionVariant(RopeStyle.NEOX, table, head_norms=HeadNorms.PER_HEAD))
        if layer >= dense:
            builder.experts(layer, experts)
        else:
            builder.feed_forward(layer)


def minimax_m2(builder: ProgramBuilder) -> None:
    """MiniMax M2: q and k are normed in their whole width, sigmoid gates with a bias for the choice."""
    experts = read_experts(builder.keys, builder.hyperparameters, gating=Gating.SIGMOID)
    table = builder.rope_table()
    for layer in builder.layers():
        builder.require(layer, "exp_probs_b.bias")
        builder.attention(layer, AttentionVariant(RopeStyle.NEOX, table, head_norms=HeadNorms.WHOLE))
        builder.experts(layer, experts)


def glm4moe(builder: ProgramBuilder) -> None:
    """GLM 4.5, 4.6 and their Air models: sigmoid gates with a bias for the choice, a shared expert, leading dense
    layers; q and k are normed where the file has the norms. The norm before the experts is named after attention."""
    hp, keys, table = builder.hyperparameters, builder.keys, builder.rope_table()
    shared = hp.expert_feed_forward_length * _shared_experts(builder)
    experts = read_experts(keys, hp, gating=Gating.SIGMOID, normalized=False, shared_width=shared)
    dense = _dense_layers(builder)
    for layer in builder.layers():
        norms = HeadNorms.PER_HEAD if builder.has(f"blk.{layer}.attn_q_norm.weight") else HeadNorms.NONE
        builder.attention(layer, AttentionVariant(RopeStyle.NEOX, table, head_norms=norms))
        if layer >= dense:
            builder.require(layer, "exp_probs_b.bias")
            builder.experts(layer, experts, norm="post_attention_norm")
        else:
            builder.feed_forward(layer, norm="post_attention_norm")


def _dense_layers(builder: ProgramBuilder) -> int:
    """How many of the first layers have no experts."""
    return builder.keys.count("leading_dense_block_count", 0, minimum=0, maximum=_MAX_COUNT)


def _shared_experts(builder: ProgramBuilder) -> int:
    return builder.keys.count("expert_shared_count", 0, minimum=0, maximum=_MAX_COUNT)


def _shared_width(builder: ProgramBuilder) -> int:
    return builder.keys.count("expert_shared_feed_forward_length", 0, minimum=0, maximum=_MAX_WIDTH)

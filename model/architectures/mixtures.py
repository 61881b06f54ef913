"""Models with mixtures of experts: ernie4_5-moe, hunyuan-moe, bailingmoe2, minimax-m2, glm4moe, llama4."""

from __future__ import annotations

from dataclasses import replace

from llamaclust.model.architectures.experts import ExpertsVariant, read_experts
from llamaclust.model.architectures.layers import AttentionVariant, HeadNorms, ProgramBuilder
from llamaclust.model.architectures.positions import text_sections
from llamaclust.model.steps.options import ExpertOptions, Gating, RopeStyle

_MAX_WIDTH = 1 << 20
_MAX_COUNT = 1 << 10
_CHUNKED_PERIOD = 4
_CHUNK = 8192
_TEMPERATURE = (0.1, 8192, 1)
_MAVERICK_EXPERTS = 128
_LLAMA4_EXPERTS = ExpertOptions(gating=Gating.SIGMOID, normalized=False, weighs_inputs=True)


def ernie4_5_moe(builder: ProgramBuilder) -> None:
    """Builds ERNIE 4.5 with experts. After the first layers, every `interleave_moe_layer_step`-th layer has a shared
    expert, and experts that are chosen with a bias. All other layers are dense."""
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
    """Builds Hunyuan A13B. Each head of q and k is normed after RoPE. Every layer has a shared expert."""
    hp, table = builder.hyperparameters, builder.rope_table()
    shared = _shared_width(builder) or hp.feed_forward_length
    experts = read_experts(builder.keys, hp, gating=Gating.SOFTMAX, shared_width=shared)
    for layer in builder.layers():
        builder.attention(layer, AttentionVariant(RopeStyle.NEOX, table, head_norms=HeadNorms.PER_HEAD_AFTER_ROPE))
        builder.experts(layer, experts)


def bailingmoe2(builder: ProgramBuilder) -> None:
    """Builds Ling and Ring 2.0. Dense layers come first. The other layers have shared experts, and grouped experts
    with sigmoid gates."""
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
    """Builds MiniMax M2. Norms of q and k cover all heads. Experts have sigmoid gates and are chosen with a bias."""
    experts = read_experts(builder.keys, builder.hyperparameters, gating=Gating.SIGMOID)
    table = builder.rope_table()
    for layer in builder.layers():
        builder.require(layer, "exp_probs_b.bias")
        builder.attention(layer, AttentionVariant(RopeStyle.NEOX, table, head_norms=HeadNorms.WHOLE))
        builder.experts(layer, experts)


def glm4moe(builder: ProgramBuilder) -> None:
    """Builds GLM 4.5, 4.6 and Air. Dense layers come first. The others have a shared expert. Their routed experts
    have sigmoid gates and are chosen with a bias. The feed-forward norm is named `post_attention_norm`. GLM 4.5V has
    RoPE by sections."""
    hp, keys, table = builder.hyperparameters, builder.keys, builder.rope_table()
    sections = text_sections(keys, hp.rope.dimension_count // 2)
    shared = hp.expert_feed_forward_length * _shared_experts(builder)
    experts = read_experts(keys, hp, gating=Gating.SIGMOID, normalized=False, shared_width=shared)
    dense = _dense_layers(builder)
    for layer in builder.layers():
        norms = HeadNorms.PER_HEAD if builder.has(f"blk.{layer}.attn_q_norm.weight") else HeadNorms.NONE
        builder.attention(layer, AttentionVariant(RopeStyle.NEOX, table, head_norms=norms, sections=sections))
        if layer >= dense:
            builder.require(layer, "exp_probs_b.bias")
            builder.experts(layer, experts, norm="post_attention_norm")
        else:
            builder.feed_forward(layer, norm="post_attention_norm")


def llama4(builder: ProgramBuilder) -> None:
    """Builds Llama 4. In three of four layers, a token attends only to its own chunk. Every fourth layer has no RoPE,
    and multiplies queries by a function of the position. Sigmoid gates weight the experts' inputs."""
    hp, keys = builder.hyperparameters, builder.keys
    if not hp.expert_count:
        raise keys.error("expert_count", "the count is missing or 0, but the architecture has experts")
    experts = ExpertsVariant(_LLAMA4_EXPERTS, shared_width=hp.expert_feed_forward_length)
    period = keys.count("interleave_moe_layer_step", maximum=_MAX_COUNT)
    variants = _attention_variants(builder)
    for layer in builder.layers():
        builder.attention(layer, variants[layer])
        if (layer + 1) % period == 0:
            builder.experts(layer, experts)
        else:
            builder.feed_forward(layer)


def _attention_variants(builder: ProgramBuilder) -> list[AttentionVariant]:
    hp, keys = builder.hyperparameters, builder.keys
    if keys.has("attention.sliding_window") and hp.sliding_window is None:
        # A window of 0 marks models without chunks.
        raise keys.error("attention.sliding_window", "a window of 0 is not supported")
    base = keys.real("rope.freq_base_swa", hp.rope.frequency_base, minimum=1.0, maximum=1e12)
    part = AttentionVariant(
        RopeStyle.NORM,
        builder.rope_table(replace(hp.rope, frequency_base=base)),
        hp.sliding_window or _CHUNK,
        head_norms=HeadNorms.NONE if hp.expert_count == _MAVERICK_EXPERTS else HeadNorms.UNIT_AFTER_ROPE,
        chunked=True,
    )
    whole = AttentionVariant(RopeStyle.NORM, temperature=_TEMPERATURE)
    return [part if windowed else whole for windowed in keys.windowed_layers(hp.block_count, _CHUNKED_PERIOD)]


def _dense_layers(builder: ProgramBuilder) -> int:
    return builder.keys.count("leading_dense_block_count", 0, minimum=0, maximum=_MAX_COUNT)


def _shared_experts(builder: ProgramBuilder) -> int:
    return builder.keys.count("expert_shared_count", 0, minimum=0, maximum=_MAX_COUNT)


def _shared_width(builder: ProgramBuilder) -> int:
    return builder.keys.count("expert_shared_feed_forward_length", 0, minimum=0, maximum=_MAX_WIDTH)

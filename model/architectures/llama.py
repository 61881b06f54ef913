"""LLaMA and models like it: llama, internlm2, baichuan, mistral3, smollm3, seed_oss, ernie4_5, hunyuan-dense."""

from __future__ import annotations

from dataclasses import replace

from llamaclust.model.architectures.experts import ExpertsVariant
from llamaclust.model.architectures.layers import AttentionVariant, HeadNorms, ProgramBuilder
from llamaclust.model.architectures.positions import alibi_slopes
from llamaclust.model.steps.options import RopeStyle

_BAICHUAN_7B_LAYERS, _BAICHUAN_13B_LAYERS = 32, 40
_SMOLLM3_PERIOD = 4
_MAX_SCALE = 1e3


def llama(builder: ProgramBuilder) -> None:
    """Builds LLaMA 1 to 3.x, Mistral, Mixtral, SmolLM and others that GGUF files call llama. Rows of Q and K are
    permuted, so that RoPE pairs adjacent channels. A sliding window in the file (Mistral 7B v0.1 has one) is used."""
    table = builder.rope_table()
    for layer in builder.layers():
        builder.attention(layer, AttentionVariant(RopeStyle.NORM, table, builder.hyperparameters.sliding_window))
        if builder.hyperparameters.expert_count:
            builder.experts(layer, ExpertsVariant())
        else:
            builder.feed_forward(layer)


def internlm2(builder: ProgramBuilder) -> None:
    """Builds InternLM 2 and 2.5, which are LLaMA: q, k and v are separate, and rows of Q and K are permuted."""
    table = builder.rope_table()
    for layer in builder.layers():
        builder.attention(layer, AttentionVariant(RopeStyle.NORM, table))
        builder.feed_forward(layer)


def baichuan(builder: ProgramBuilder) -> None:
    """Builds Baichuan 7B, which is LLaMA, and Baichuan 13B, which has ALiBi. The number of layers distinguishes them,
    as in llama.cpp. A sliding window in the file is ignored, because the models were trained without one."""
    layers, heads = builder.hyperparameters.block_count, builder.hyperparameters.head_count
    if layers not in (_BAICHUAN_7B_LAYERS, _BAICHUAN_13B_LAYERS):
        known = f"{_BAICHUAN_7B_LAYERS} (with RoPE) and {_BAICHUAN_13B_LAYERS} (with ALiBi)"
        raise builder.model.error(
            "baichuan.block_count", f"{layers} layers are not supported; supported are {known}", "use another model"
        )
    table = builder.rope_table() if layers == _BAICHUAN_7B_LAYERS else None
    slopes = alibi_slopes(heads) if layers == _BAICHUAN_13B_LAYERS else None
    for layer in builder.layers():
        builder.attention(layer, AttentionVariant(RopeStyle.NORM, table, slopes=slopes))
        builder.feed_forward(layer)


def mistral3(builder: ProgramBuilder) -> None:
    """Builds Mistral Small 3 and Ministral 3, which are LLaMA. Newer models multiply queries by a function of the
    position."""
    keys, rope = builder.keys, builder.hyperparameters.rope
    factor = keys.real("attention.temperature_scale", 0.0, minimum=0.0, maximum=_MAX_SCALE)
    temperature = (factor, rope.original_context_length) if factor else None
    multiplier = keys.real("rope.scaling.yarn_log_multiplier", 0.0, minimum=0.0, maximum=_MAX_SCALE)
    table = builder.rope_table(replace(rope, log_multiplier=multiplier))
    for layer in builder.layers():
        builder.attention(layer, AttentionVariant(RopeStyle.NORM, table, temperature=temperature))
        if builder.hyperparameters.expert_count:
            builder.experts(layer, ExpertsVariant())
        else:
            builder.feed_forward(layer)


def smollm3(builder: ProgramBuilder) -> None:
    """Builds SmolLM 3. Every fourth layer has no RoPE."""
    table = builder.rope_table()
    for layer in builder.layers():
        rotated = (layer + 1) % _SMOLLM3_PERIOD != 0
        builder.attention(layer, AttentionVariant(RopeStyle.NORM, table if rotated else None))
        builder.feed_forward(layer)


def seed_oss(builder: ProgramBuilder) -> None:
    """Builds Seed-OSS, with biases on q, k and v. The feed-forward norm is named `post_attention_norm`."""
    table = builder.rope_table()
    for layer in builder.layers():
        builder.attention(layer, AttentionVariant(RopeStyle.NEOX, table))
        builder.feed_forward(layer, norm="post_attention_norm")


def ernie4_5(builder: ProgramBuilder) -> None:
    table = builder.rope_table()
    for layer in builder.layers():
        builder.attention(layer, AttentionVariant(RopeStyle.NORM, table))
        builder.feed_forward(layer)


def hunyuan_dense(builder: ProgramBuilder) -> None:
    """Builds Hunyuan 0.5B to 7B. Each head of q and k is normed after RoPE."""
    table = builder.rope_table()
    for layer in builder.layers():
        builder.attention(layer, AttentionVariant(RopeStyle.NEOX, table, head_norms=HeadNorms.PER_HEAD_AFTER_ROPE))
        builder.feed_forward(layer)

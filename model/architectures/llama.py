"""LLaMA and models of its layers: llama, internlm2, baichuan, mistral3, smollm3, seed_oss, ernie4_5, hunyuan-dense."""

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
    """LLaMA 1 to 3.x, Mistral, Mixtral, SmolLM and everything else that GGUF files call by this name.

    GGUF files of this architecture have the rows of Q and K permuted for neighbouring pairs. A sliding window is
    obeyed: Mistral 7B v0.1 was trained with one, and no switch of that model's configuration turns it off."""
    table = builder.rope_table()
    for layer in builder.layers():
        builder.attention(layer, AttentionVariant(RopeStyle.NORM, table, builder.hyperparameters.sliding_window))
        if builder.hyperparameters.expert_count:
            builder.experts(layer, ExpertsVariant())
        else:
            builder.feed_forward(layer)


def internlm2(builder: ProgramBuilder) -> None:
    """InternLM 2 and 2.5: LLaMA with tensor names of their own. GGUF files hold q, k and v apart, their rows permuted
    for neighbouring pairs as those of LLaMA."""
    table = builder.rope_table()
    for layer in builder.layers():
        builder.attention(layer, AttentionVariant(RopeStyle.NORM, table))
        builder.feed_forward(layer)


def baichuan(builder: ProgramBuilder) -> None:
    """Baichuan 7B, which is LLaMA by another name, and 13B, which has ALiBi instead of a rotation.

    Files do not say which of the two a model is; its layers do, as in llama.cpp. A sliding window that the file names
    is not used: the models were trained without."""
    layers, heads = builder.hyperparameters.block_count, builder.hyperparameters.head_count
    if layers not in (_BAICHUAN_7B_LAYERS, _BAICHUAN_13B_LAYERS):
        known = f"{_BAICHUAN_7B_LAYERS}, with a rotation, and {_BAICHUAN_13B_LAYERS}, with ALiBi, are known"
        raise builder.model.error("baichuan.block_count", f"{layers} layers; only {known}", "take another model")
    table = builder.rope_table() if layers == _BAICHUAN_7B_LAYERS else None
    slopes = alibi_slopes(heads) if layers == _BAICHUAN_13B_LAYERS else None
    for layer in builder.layers():
        builder.attention(layer, AttentionVariant(RopeStyle.NORM, table, slopes=slopes))
        builder.feed_forward(layer)


def mistral3(builder: ProgramBuilder) -> None:
    """Mistral Small 3 and Ministral 3: LLaMA, in newer models with queries that are scaled by their position."""
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
    """SmolLM 3: every fourth layer has no rotation."""
    table = builder.rope_table()
    for layer in builder.layers():
        rotated = (layer + 1) % _SMOLLM3_PERIOD != 0
        builder.attention(layer, AttentionVariant(RopeStyle.NORM, table if rotated else None))
        builder.feed_forward(layer)


def seed_oss(builder: ProgramBuilder) -> None:
    """Seed-OSS: biases on q, k and v; the norm before the feed-forward network is named after attention."""
    table = builder.rope_table()
    for layer in builder.layers():
        builder.attention(layer, AttentionVariant(RopeStyle.NEOX, table))
        builder.feed_forward(layer, norm="post_attention_norm")


def ernie4_5(builder: ProgramBuilder) -> None:
    """ERNIE 4.5 without experts."""
    table = builder.rope_table()
    for layer in builder.layers():
        builder.attention(layer, AttentionVariant(RopeStyle.NORM, table))
        builder.feed_forward(layer)


def hunyuan_dense(builder: ProgramBuilder) -> None:
    """Hunyuan 0.5B to 7B: q and k are normed head by head after they are rotated."""
    table = builder.rope_table()
    for layer in builder.layers():
        builder.attention(layer, AttentionVariant(RopeStyle.NEOX, table, head_norms=HeadNorms.PER_HEAD_AFTER_ROPE))
        builder.feed_forward(layer)

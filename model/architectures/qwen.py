"""Qwen: qwen2, qwen2moe, qwen3, qwen3moe, qwen3vl, qwen3vlmoe. LLaMA with rotations of channels half a head apart. A
window in the file is ignored: the models turn it off (`use_sliding_window`), for which GGUF has no key."""

from __future__ import annotations

from llamaclust.model.architectures.experts import ExpertsVariant
from llamaclust.model.architectures.layers import AttentionVariant, HeadNorms, ProgramBuilder
from llamaclust.model.architectures.positions import check_sections
from llamaclust.model.steps.options import ExpertOptions, RopeStyle

_BIASES = ("attn_q.bias", "attn_k.bias", "attn_v.bias")


def qwen2(builder: ProgramBuilder) -> None:
    """Qwen 2 and 2.5: biases on q, k and v."""
    table = builder.rope_table()
    for layer in builder.layers():
        builder.require(layer, *_BIASES)
        builder.attention(layer, AttentionVariant(RopeStyle.NEOX, table))
        builder.feed_forward(layer)


def qwen2moe(builder: ProgramBuilder) -> None:
    """Qwen 1.5 and 2 with experts, whose weights are not normalized, and a shared expert that a sigmoid weights."""
    shared = builder.keys.count(
        "expert_shared_feed_forward_length", builder.hyperparameters.feed_forward_length, maximum=1 << 20
    )
    variant = ExpertsVariant(ExpertOptions(normalized=False), shared_width=shared, shared_gate=True)
    table = builder.rope_table()
    for layer in builder.layers():
        builder.require(layer, *_BIASES)
        builder.attention(layer, AttentionVariant(RopeStyle.NEOX, table))
        builder.experts(layer, variant)


def qwen3(builder: ProgramBuilder) -> None:
    """Qwen 3: q and k are normed per head before the rotation. A reranker has a head of two rows, `yes` and `no`."""
    table = builder.rope_table()
    for layer in builder.layers(may_rank=True):
        builder.attention(layer, AttentionVariant(RopeStyle.NEOX, table, head_norms=HeadNorms.PER_HEAD))
        builder.feed_forward(layer)


def qwen3moe(builder: ProgramBuilder) -> None:
    """Qwen 3 with experts in every layer. Their weights are normalized (`norm_topk_prob` in all these models)."""
    table = builder.rope_table()
    for layer in builder.layers():
        builder.attention(layer, AttentionVariant(RopeStyle.NEOX, table, head_norms=HeadNorms.PER_HEAD))
        builder.experts(layer, ExpertsVariant())


def qwen3vl(builder: ProgramBuilder) -> None:
    """Qwen 3 VL, text only, where it equals Qwen 3. (Images would add to the first layers.)"""
    check_sections(builder.keys, builder.hyperparameters.rope.dimension_count // 2)
    qwen3(builder)


def qwen3vlmoe(builder: ProgramBuilder) -> None:
    check_sections(builder.keys, builder.hyperparameters.rope.dimension_count // 2)
    qwen3moe(builder)

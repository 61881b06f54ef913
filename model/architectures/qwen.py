"""Qwen: qwen2, qwen2vl, qwen2moe, qwen3, qwen3moe, qwen3vl, qwen3vlmoe. They are LLaMA, but RoPE pairs channels that
are half a head apart. Original models turn off the sliding window, so a window in the file is ignored."""

from __future__ import annotations

from dataclasses import replace

from llamaclust.model.architectures.experts import ExpertsVariant
from llamaclust.model.architectures.layers import AttentionVariant, HeadNorms, ProgramBuilder
from llamaclust.model.architectures.positions import rope_sections
from llamaclust.model.steps.options import ExpertOptions, RopeStyle

_BIASES = ("attn_q.bias", "attn_k.bias", "attn_v.bias")


def qwen2(builder: ProgramBuilder) -> None:
    _qwen2_layers(builder, AttentionVariant(RopeStyle.NEOX, builder.rope_table()))


def qwen2vl(builder: ProgramBuilder) -> None:
    """Builds the text models of Qwen 2 VL and 2.5 VL, which are Qwen 2 with RoPE by sections."""
    sections = rope_sections(builder.keys, builder.hyperparameters.rope.dimension_count // 2, interleaved=False)
    _qwen2_layers(builder, AttentionVariant(RopeStyle.NEOX, builder.rope_table(), sections=sections))


def _qwen2_layers(builder: ProgramBuilder, variant: AttentionVariant) -> None:
    for layer in builder.layers():
        builder.require(layer, *_BIASES)
        builder.attention(layer, variant)
        builder.feed_forward(layer)


def qwen2moe(builder: ProgramBuilder) -> None:
    """Builds Qwen 1.5 and 2 with experts. Expert weights are not normalized. The shared expert has a sigmoid gate."""
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
    """Builds Qwen 3. Each head of q and k is normed before RoPE. A reranker's head has two rows, `yes` and `no`."""
    variant = _with_head_norms(builder)
    for layer in builder.layers(may_rank=True):
        builder.attention(layer, variant)
        builder.feed_forward(layer)


def qwen3moe(builder: ProgramBuilder) -> None:
    """Builds Qwen 3 with experts in every layer. Expert weights are normalized, as if `norm_topk_prob` were set."""
    variant = _with_head_norms(builder)
    for layer in builder.layers():
        builder.attention(layer, variant)
        builder.experts(layer, ExpertsVariant())


def qwen3vl(builder: ProgramBuilder) -> None:
    """Builds the text model of Qwen 3 VL, which is Qwen 3 with interleaved RoPE sections. The first layers add results
    of the image encoder's inner layers to an image's rows (DeepStack)."""
    variant, levels = _with_sections(builder), _image_levels(builder)
    for layer in builder.layers(may_rank=True):
        builder.attention(layer, variant)
        builder.feed_forward(layer)
        if layer < levels:
            builder.add_given(1 + layer)


def qwen3vlmoe(builder: ProgramBuilder) -> None:
    variant, levels = _with_sections(builder), _image_levels(builder)
    for layer in builder.layers():
        builder.attention(layer, variant)
        builder.experts(layer, ExpertsVariant())
        if layer < levels:
            builder.add_given(1 + layer)


def _with_head_norms(builder: ProgramBuilder) -> AttentionVariant:
    return AttentionVariant(RopeStyle.NEOX, builder.rope_table(), head_norms=HeadNorms.PER_HEAD)


def _with_sections(builder: ProgramBuilder) -> AttentionVariant:
    sections = rope_sections(builder.keys, builder.hyperparameters.rope.dimension_count // 2, interleaved=True)
    return replace(_with_head_norms(builder), sections=sections)


def _image_levels(builder: ProgramBuilder) -> int:
    layers = builder.hyperparameters.block_count
    return builder.keys.count("n_deepstack_layers", 0, minimum=0, maximum=layers)

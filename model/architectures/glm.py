"""GLM: chatglm, glm4. Gate and up are one tensor, and q, k and v are one tensor. RoPE rotates half of a head."""

from __future__ import annotations

from llamaclust.model.architectures.layers import AttentionVariant, Norms, ProgramBuilder
from llamaclust.model.architectures.positions import text_sections
from llamaclust.model.steps.options import RopeStyle


def chatglm(builder: ProgramBuilder) -> None:
    _layers(builder, AttentionVariant(RopeStyle.NORM, builder.rope_table()), Norms.BEFORE)


def glm4(builder: ProgramBuilder) -> None:
    """Builds GLM 4 and 4.1V. GLM 4.1V's RoPE has sections, and pairs channels that are a quarter of a head apart."""
    sections = text_sections(builder.keys, builder.hyperparameters.rope.dimension_count // 2)
    style = RopeStyle.NORM if sections is None else RopeStyle.NEOX
    _layers(builder, AttentionVariant(style, builder.rope_table(), sections=sections), Norms.BOTH)


def _layers(builder: ProgramBuilder, variant: AttentionVariant, norms: Norms) -> None:
    for layer in builder.layers():
        builder.attention(layer, variant, norms=norms)
        builder.feed_forward(layer, fused=True, norms=norms)

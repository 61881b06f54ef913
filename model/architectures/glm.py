"""GLM: chatglm, glm4. Gate and up are one tensor, as are q, k and v. Half of a head's channels turn, in pairs."""

from __future__ import annotations

from llamaclust.model.architectures.layers import AttentionVariant, Norms, ProgramBuilder
from llamaclust.model.steps.options import RopeStyle


def chatglm(builder: ProgramBuilder, *, norms: Norms = Norms.BEFORE) -> None:
    table = builder.rope_table()
    for layer in builder.layers():
        builder.attention(layer, AttentionVariant(RopeStyle.NORM, table), norms=norms)
        builder.feed_forward(layer, fused=True, norms=norms)


def glm4(builder: ProgramBuilder) -> None:
    chatglm(builder, norms=Norms.BOTH)

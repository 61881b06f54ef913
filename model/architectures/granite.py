"""Granite 3, and Granite 4 without Mamba 2: granite, granitemoe. Granite is LLaMA with additional factors."""

from __future__ import annotations

from dataclasses import dataclass

from llamaclust.model.architectures.experts import ExpertsVariant
from llamaclust.model.architectures.layers import AttentionVariant, ProgramBuilder
from llamaclust.model.model_keys import ModelKeys
from llamaclust.model.steps.options import RopeStyle

_MAX_SCALE = 1e6


@dataclass(frozen=True, slots=True)
class GraniteScales:
    """Granite's factors for the embedding, the result of each block, the logits, and the attention scores."""

    embedding: float
    residual: float
    logits: float
    scores: float | None

    @classmethod
    def of(cls, keys: ModelKeys) -> GraniteScales:
        return cls(
            embedding=keys.real("embedding_scale", 0.0, minimum=0.0, maximum=_MAX_SCALE) or 1.0,
            residual=keys.real("residual_scale", 0.0, minimum=0.0, maximum=_MAX_SCALE) or 1.0,
            logits=1 / keys.real("logit_scale", minimum=1e-6, maximum=_MAX_SCALE),
            scores=keys.real("attention.scale", 0.0, minimum=0.0, maximum=_MAX_SCALE) or None,
        )


def granite_attention(builder: ProgramBuilder, scales: GraniteScales) -> AttentionVariant:
    table = builder.rope_table() if builder.keys.flag("rope.scaling.finetuned", True) else None
    return AttentionVariant(RopeStyle.NORM, table, scale=scales.scores)


def granite_experts(keys: ModelKeys) -> ExpertsVariant:
    shared = keys.count("expert_shared_feed_forward_length", 0, minimum=0, maximum=1 << 20)
    return ExpertsVariant(shared_width=shared)


def granite(builder: ProgramBuilder) -> None:
    hp, scales = builder.hyperparameters, GraniteScales.of(builder.keys)
    attention, experts = granite_attention(builder, scales), granite_experts(builder.keys)
    builder.scale_residuals(scales.residual)
    for layer in builder.layers(scales.embedding, logit_factor=scales.logits):
        builder.attention(layer, attention)
        if hp.expert_count:
            builder.experts(layer, experts)
        else:
            builder.feed_forward(layer)

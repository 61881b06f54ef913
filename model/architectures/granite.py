"""Granite 3 and 4 without states: granite, granitemoe. LLaMA with scales of embedding, scores, residuals, logits."""

from __future__ import annotations

from llamaclust.model.architectures.experts import ExpertsVariant
from llamaclust.model.architectures.layers import AttentionVariant, ProgramBuilder
from llamaclust.model.step_options import RopeStyle

_MAX_SCALE = 1e6


def granite(builder: ProgramBuilder) -> None:
    """`rope.scaling.finetuned` says whether there is a rotation at all."""
    hp, keys = builder.hyperparameters, builder.keys
    shared = keys.count("expert_shared_feed_forward_length", 0, minimum=0, maximum=1 << 20)
    experts = ExpertsVariant(shared_width=shared)
    embedding = keys.real("embedding_scale", 0.0, minimum=0.0, maximum=_MAX_SCALE) or 1.0
    scale = keys.real("attention.scale", 0.0, minimum=0.0, maximum=_MAX_SCALE) or None
    logits = keys.real("logit_scale", minimum=1e-6, maximum=_MAX_SCALE)
    builder.scale_residuals(keys.real("residual_scale", 0.0, minimum=0.0, maximum=_MAX_SCALE) or 1.0)
    table = builder.rope_table() if keys.flag("rope.scaling.finetuned", True) else None
    for layer in builder.layers(embedding, logit_factor=1 / logits):
        builder.attention(layer, AttentionVariant(RopeStyle.NORM, table, scale=scale))
        if hp.expert_count:
            builder.experts(layer, experts)
        else:
            builder.feed_forward(layer)

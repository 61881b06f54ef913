"""Phi 3, 3.5 and 4: phi3. Gate and up are one tensor, and q, k and v are one tensor."""

from __future__ import annotations

from llamaclust.model.architectures.layers import AttentionVariant, ProgramBuilder
from llamaclust.model.steps.options import RopeStyle


def phi3(builder: ProgramBuilder) -> None:
    """Builds Phi 3 and 4. A sliding window in the file is used, because the models for 4096 tokens write nonsense
    without it. In models for long contexts, the cluster's `context_length` selects short or long RoPE factors."""
    table = builder.rope_table()
    for layer in builder.layers():
        builder.attention(layer, AttentionVariant(RopeStyle.NEOX, table, builder.hyperparameters.sliding_window))
        builder.feed_forward(layer, fused=True)

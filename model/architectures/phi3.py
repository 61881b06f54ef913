"""Phi 3, 3.5 and 4: phi3. Gate and up are one tensor, as are q, k and v. Rotations have factors for long contexts."""

from __future__ import annotations

from llamaclust.model.architectures.layers import AttentionVariant, ProgramBuilder
from llamaclust.model.steps.options import RopeStyle


def phi3(builder: ProgramBuilder) -> None:
    """Phi 3 and 4. A window in the file is used: without it, the models for 4096 tokens write nonsense. In models for
    long contexts, the cluster's `context_length` decides between short and long factors of rotations."""
    table = builder.rope_table()
    for layer in builder.layers():
        builder.attention(layer, AttentionVariant(RopeStyle.NEOX, table, builder.hyperparameters.sliding_window))
        builder.feed_forward(layer, fused=True)

"""phi3: Phi 3, 3.5 and 4. One tensor for q, k and v, one for gate and up; factors for long contexts."""

from __future__ import annotations

from llamaclust.model.architectures.layers import AttentionVariant, ProgramBuilder
from llamaclust.model.steps.options import RopeStyle


def phi3(builder: ProgramBuilder) -> None:
    """A sliding window is obeyed where the file names one: the models for 4096 tokens write nonsense without theirs.

    Rotations of a model for long contexts are divided by short or by long factors, whichever belong to the context that
    the cluster is set up for: `context_length` is part of what decides its tokens.
    """
    table = builder.rope_table()
    for layer in builder.layers():
        builder.attention(layer, AttentionVariant(RopeStyle.NEOX, table, builder.hyperparameters.sliding_window))
        builder.feed_forward(layer, fused=True)

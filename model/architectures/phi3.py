"""phi3: Phi 3, 3.5 and 4. One tensor for q, k and v, one for gate and up; factors for long contexts."""

from __future__ import annotations

from llamaclust.model.architectures.layers import AttentionVariant, ProgramBuilder
from llamaclust.model.steps.options import RopeStyle


def phi3(builder: ProgramBuilder) -> None:
    """Phi 3 and 4. A window in the file is obeyed: the models for 4096 tokens write nonsense without theirs. In models
    for long contexts, `context_length` of the cluster chooses between short and long factors of rotations."""
    table = builder.rope_table()
    for layer in builder.layers():
        builder.attention(layer, AttentionVariant(RopeStyle.NEOX, table, builder.hyperparameters.sliding_window))
        builder.feed_forward(layer, fused=True)

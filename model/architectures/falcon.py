"""falcon: Falcon 7B, 40B, 180B. Attention and the inner layer side by side, norms with a mean, few key heads."""

from __future__ import annotations

from llamaclust.model.architectures.layers import ProgramBuilder
from llamaclust.model.program import ActivationFunction, Program, RopeStyle


def build(builder: ProgramBuilder) -> Program:
    """Both halves of a layer read the hidden state as it was before it: normed once for both, or, in the larger models,
    for each (`attn_norm_2` is attention's)."""
    table = builder.rope_table()
    builder.use_layer_norms()
    builder.embed()
    for layer in range(builder.start, builder.end):
        builder.parallel(layer, RopeStyle.NEOX, table, ActivationFunction.GELU_TANH)
    builder.head()
    return builder.program()

"""starcoder2: StarCoder 2. Norms with a mean, biases, one plain inner layer, rotations of pairs half a head apart."""

from __future__ import annotations

from llamaclust.model.architectures.layers import ProgramBuilder
from llamaclust.model.program import GeluKind, Program, RopeStyle


def build(page: ProgramBuilder) -> Program:
    """A sliding window is obeyed where the file names one: these models were trained with it."""
    table = page.rope_table()
    page.use_layer_norms()
    page.embed()
    for layer in range(page.start, page.end):
        page.attention(layer, RopeStyle.NEOX, table, page.hyperparameters.sliding_window)
        page.plain_feed_forward(layer, GeluKind.TANH)
    page.head()
    return page.program()

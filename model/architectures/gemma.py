"""gemma: Gemma 1. The embedding is scaled and used again as the head; the gate is a GELU."""

from __future__ import annotations

import math

from llamaclust.model.architectures.layers import ProgramBuilder
from llamaclust.model.program import GeluKind, Program, RopeStyle


def build(page: ProgramBuilder) -> Program:
    """Norm weights of the model are relative to one, those of GGUF files are not."""
    table = page.rope_table()
    page.embed(math.sqrt(page.hyperparameters.embedding_length))
    for layer in range(page.start, page.end):
        page.attention(layer, RopeStyle.NEOX, table)
        page.feed_forward(layer, gelu=GeluKind.TANH)
    page.head()
    return page.program()

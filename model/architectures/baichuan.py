"""baichuan: Baichuan 7B, which is LLaMA by another name. The 13B model has ALiBi instead of rotation and is refused."""

from __future__ import annotations

from llamaclust.model.architectures.layers import ProgramBuilder
from llamaclust.model.program import Program, RopeStyle

_LAYERS_7B = 32


def build(page: ProgramBuilder) -> Program:
    """A sliding window that the file names is not used: the model was trained without."""
    layers = page.hyperparameters.block_count
    if layers != _LAYERS_7B:
        what = f"{layers} layers; only the {_LAYERS_7B} of the 7B model are supported, others have ALiBi"
        raise page.model.error("baichuan.block_count", what, "take another model")
    table = page.rope_table()
    page.embed()
    for layer in range(page.start, page.end):
        page.attention(layer, RopeStyle.NORM, table)
        page.feed_forward(layer)
    page.head()
    return page.program()

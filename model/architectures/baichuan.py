"""baichuan: Baichuan 7B, which is LLaMA by another name, and 13B, which has ALiBi instead of a rotation."""

from __future__ import annotations

from llamaclust.model.architectures.alibi import alibi_slopes
from llamaclust.model.architectures.layers import ProgramBuilder
from llamaclust.model.program import Program, RopeStyle

_LAYERS_7B, _LAYERS_13B = 32, 40


def build(page: ProgramBuilder) -> Program:
    """Files do not say which of the two a model is; its layers do, as in llama.cpp. A sliding window that the file
    names is not used: the models were trained without."""
    layers, heads = page.hyperparameters.block_count, page.hyperparameters.head_count
    if layers not in (_LAYERS_7B, _LAYERS_13B):
        known = f"{_LAYERS_7B}, with a rotation, and {_LAYERS_13B}, with ALiBi, are known"
        raise page.model.error("baichuan.block_count", f"{layers} layers; only {known}", "take another model")
    table = page.rope_table() if layers == _LAYERS_7B else None
    slopes = alibi_slopes(heads) if layers == _LAYERS_13B else None
    page.embed()
    for layer in range(page.start, page.end):
        page.attention(layer, RopeStyle.NORM, table, slopes=slopes)
        page.feed_forward(layer)
    page.head()
    return page.program()

"""baichuan: Baichuan 7B, which is LLaMA by another name, and 13B, which has ALiBi instead of a rotation."""

from __future__ import annotations

from llamaclust.model.architectures.alibi import alibi_slopes
from llamaclust.model.architectures.layers import AttentionVariant, ProgramBuilder
from llamaclust.model.program import Program, RopeStyle

_LAYERS_7B, _LAYERS_13B = 32, 40


def build(builder: ProgramBuilder) -> Program:
    """Files do not say which of the two a model is; its layers do, as in llama.cpp. A sliding window that the file
    names is not used: the models were trained without."""
    layers, heads = builder.hyperparameters.block_count, builder.hyperparameters.head_count
    if layers not in (_LAYERS_7B, _LAYERS_13B):
        known = f"{_LAYERS_7B}, with a rotation, and {_LAYERS_13B}, with ALiBi, are known"
        raise builder.model.error("baichuan.block_count", f"{layers} layers; only {known}", "take another model")
    table = builder.rope_table() if layers == _LAYERS_7B else None
    slopes = alibi_slopes(heads) if layers == _LAYERS_13B else None
    builder.embed()
    for layer in range(builder.start, builder.end):
        builder.attention(layer, AttentionVariant(RopeStyle.NORM, table, slopes=slopes))
        builder.feed_forward(layer)
    builder.head()
    return builder.program()

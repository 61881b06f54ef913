"""Small models with states of sequences in their layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from llamaclust.model.gguf.writer import WritableValue
from support.models.tiny.delta_models import DELTA_MODELS
from support.models.tiny.shape import Tiny
from support.models.tiny_model import RandomTensor, matrix

_LFM2: dict[str, Any] = {
    "layers": 5,
    "taps": 3,
    "convolutions": (0, 1, 3),
    "last_norm": "token_embd_norm",
    "head_norms": True,
    "tied": True,
}
_LFM2_KEYS: dict[str, WritableValue] = {
    "attention.head_count_kv": np.array([0, 0, 2, 0, 2], np.int32),
    "shortconv.l_cache": 3,
}

STATE_MODELS: Mapping[str, Tiny] = {
    **DELTA_MODELS,
    "lfm2": Tiny("lfm2", **_LFM2, keys=_LFM2_KEYS),
    "lfm2-windows": Tiny("lfm2", **_LFM2, keys={**_LFM2_KEYS, "attention.sliding_window": 6}),
    "lfm2moe": Tiny(
        "lfm2moe",
        **_LFM2,
        experts=8,
        selection_bias=True,
        dense=2,
        keys={**_LFM2_KEYS, "leading_dense_block_count": 2, "expert_gating_func": 2},
    ),
}


def convolution(tiny: Tiny, name: str) -> Iterator[RandomTensor]:
    """Yields the tensors of a convolution layer, which replace attention."""
    if tiny.delta is not None:
        yield from tiny.delta.tensors(name, tiny.hidden)
        return
    yield matrix(f"{name}.shortconv.in_proj", 3 * tiny.hidden, tiny.hidden, gain=2.0)
    yield RandomTensor(f"{name}.shortconv.conv.weight", (tiny.hidden, tiny.taps), 0.7)
    yield matrix(f"{name}.shortconv.out_proj", tiny.hidden, tiny.hidden)

"""KV memory in blocks, float16, one pair of arrays a layer."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from llamaclust.kernels.backend import Float32, Int32
from llamaclust.model.program import KV_BLOCK_TOKENS, Attention

Float16 = NDArray[np.float16]
Float64 = NDArray[np.float64]


def block_bytes(step: Attention) -> int:
    """Bytes of one layer's K and V of a KV block."""
    return 2 * KV_BLOCK_TOKENS * step.kv_heads * step.head_dim * np.dtype(np.float16).itemsize


class LayerKv:
    """K and V of one layer, [blocks * KV_BLOCK_TOKENS, kv_heads, head_dim]. What was never stored is NaN."""

    def __init__(self, step: Attention, blocks: int) -> None:
        shape = (blocks * KV_BLOCK_TOKENS, step.kv_heads, step.head_dim)
        self._keys: Float16 = np.full(shape, np.nan, np.float16)
        self._values: Float16 = np.full(shape, np.nan, np.float16)

    @property
    def n_bytes(self) -> int:
        return self._keys.nbytes + self._values.nbytes

    def store(self, table: Int32, positions: Int32, keys: Float32, values: Float32) -> None:
        """Rounds keys and values [rows, kv_heads * head_dim] to float16, for positions of the sequence of `table`."""
        places = _places(table, positions)
        shape = (len(positions), *self._keys.shape[1:])
        with np.errstate(over="ignore"):
            self._keys[places] = keys.reshape(shape).astype(np.float16)
            self._values[places] = values.reshape(shape).astype(np.float16)

    def load(self, table: Int32, count: int) -> tuple[Float64, Float64]:
        """Keys and values of positions [0, count), [count, kv_heads, head_dim]."""
        places = _places(table, np.arange(count, dtype=np.int32))
        return self._keys[places].astype(np.float64), self._values[places].astype(np.float64)


def _places(table: Int32, positions: Int32) -> Int32:
    """KV indices: the blocks of `table` laid end to end are positions 0, 1, 2, ..."""
    return table[positions // KV_BLOCK_TOKENS] * np.int32(KV_BLOCK_TOKENS) + positions % np.int32(KV_BLOCK_TOKENS)

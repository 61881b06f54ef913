"""KV memory in blocks. Each layer has an array of rounded keys and an array of rounded values."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llamaclust.kernels.backend import Float32, Int32
from llamaclust.model.kv_type import KV_GROUP_CHANNELS, KvType
from llamaclust.model.program import KV_BLOCK_TOKENS, Attention

Float16 = NDArray[np.float16]
Float64 = NDArray[np.float64]
Int8 = NDArray[np.int8]


class _HalfRows:
    """Keys or values [positions, kv_heads, head_dim] in float16. They are NaN until they are stored."""

    def __init__(self, shape: tuple[int, int, int]) -> None:
        self._values: Float16 = np.full(shape, np.nan, np.float16)

    @property
    def n_bytes(self) -> int:
        return self._values.nbytes

    def store(self, places: Int32, rows: Float32) -> None:
        with np.errstate(over="ignore"):
            self._values[places] = rows.astype(np.float16)

    def load(self, places: Int32) -> Float64:
        return self._values[places].astype(np.float64)


class _ByteRows:
    """Keys or values in int8, with one float16 scale for every 32 channels of a head."""

    def __init__(self, shape: tuple[int, int, int]) -> None:
        groups = -(-shape[2] // KV_GROUP_CHANNELS)
        self._quants: Int8 = np.zeros(shape, np.int8)
        self._scales: Float16 = np.full((*shape[:2], groups), np.nan, np.float16)

    @property
    def n_bytes(self) -> int:
        return self._quants.nbytes + self._scales.nbytes

    def store(self, places: Int32, rows: Float32) -> None:
        rounded = round_to_bytes(rows)
        self._quants[places], self._scales[places] = rounded.quants, rounded.scales

    def load(self, places: Int32) -> Float64:
        return Rounded(self._quants[places], self._scales[places]).values()

    def scales(self, places: Int32) -> Float64:
        return self._scales[places].astype(np.float64)


@dataclass(frozen=True, slots=True)
class Rounded:
    quants: Int8
    scales: Float16

    def values(self) -> Float64:
        channels = self.quants.shape[-1]
        scales = self.scales.astype(np.float64).repeat(KV_GROUP_CHANNELS, axis=-1)[..., :channels]
        with np.errstate(invalid="ignore"):
            return self.quants * scales


def round_to_bytes(rows: Float32) -> Rounded:
    """Rounds rows [..., channels] to q8_0, in float32. The scale of 32 channels is their largest magnitude / 127, as
    float16, or NaN if a channel is not finite."""
    channels = rows.shape[-1]
    missing = -channels % KV_GROUP_CHANNELS
    padded = np.pad(rows, [(0, 0)] * (rows.ndim - 1) + [(0, missing)])
    groups = padded.reshape(*rows.shape[:-1], -1, KV_GROUP_CHANNELS)
    finite: NDArray[np.bool_] = np.asarray(np.isfinite(groups).all(axis=-1))
    with np.errstate(all="ignore"):
        scales = (np.abs(groups).max(axis=-1) / np.float32(127)).astype(np.float16)
        wide = scales.astype(np.float32)
        inverse = np.where(wide > 0, np.float32(1) / wide, np.float32(0))
        quants = np.rint(np.clip(groups * inverse[..., np.newaxis], -127, 127))
    quants = np.where(finite[..., np.newaxis], quants, 0).reshape(padded.shape)[..., :channels]
    return Rounded(quants.astype(np.int8), np.where(finite, scales, np.float16(np.nan)))


class LayerKv:
    """A layer's keys and values, [blocks * KV_BLOCK_TOKENS, kv_heads, head_dim]. Latent attention stores no values."""

    def __init__(self, step: Attention, blocks: int, *, windowed: bool = False) -> None:
        self.windowed = windowed  # True if the blocks are those of `Batch.window_tables`.
        self._shape = (blocks * KV_BLOCK_TOKENS, step.kv_heads, step.head_dim)
        rows = _HalfRows if step.kv_type is KvType.F16 else _ByteRows
        self._keys = rows(self._shape)
        self._values = None if step.v is None else rows(self._shape)
        self._value_dim = step.value_dim

    @property
    def n_bytes(self) -> int:
        return self._keys.n_bytes + (0 if self._values is None else self._values.n_bytes)

    def store(self, table: Int32, positions: Int32, keys: Float32, values: Float32 | None) -> None:
        assert (table[positions // KV_BLOCK_TOKENS] >= 0).all(), "a block that is not there is written"
        places = _places(table, positions)
        shape = (len(positions), *self._shape[1:])
        self._keys.store(places, keys.reshape(shape))
        if self._values is not None and values is not None:
            self._values.store(places, values.reshape(shape))

    def load(self, table: Int32, count: int) -> tuple[Float64, Float64]:
        """Returns keys [count, kv_heads, head_dim] and values [count, kv_heads, value_dim]. Missing blocks are NaN."""
        positions = np.arange(count, dtype=np.int32)
        places, gone = _places(table, positions), table[positions // KV_BLOCK_TOKENS] < 0
        keys = self._keys.load(places)
        values = keys[..., : self._value_dim] if self._values is None else self._values.load(places)
        keys[gone] = values[gone] = np.nan
        return keys, values

    def value_scales(self, table: Int32, count: int) -> Float64:
        assert isinstance(self._values, _ByteRows)
        positions = np.arange(count, dtype=np.int32)
        scales = self._values.scales(_places(table, positions))
        scales[table[positions // KV_BLOCK_TOKENS] < 0] = np.nan
        return scales


def _places(table: Int32, positions: Int32) -> Int32:
    return table[positions // KV_BLOCK_TOKENS] * np.int32(KV_BLOCK_TOKENS) + positions % np.int32(KV_BLOCK_TOKENS)

"""Reads bit fields in quantized blocks. Blocks are uint8 [blocks, bytes] with little-endian words."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Float32 = NDArray[np.float32]


def floats16(blocks: Bytes, offset: int) -> Float32:
    return words(blocks[:, offset : offset + 2], np.float16).astype(np.float32)


def words(data: Bytes, dtype: type[np.generic]) -> NDArray[Any]:
    """Views bytes [blocks, n] as little-endian words [blocks, n / word size]."""
    return np.ascontiguousarray(data).view(np.dtype(dtype).newbyteorder("<"))


def fields(data: Bytes, bits: int) -> Bytes:
    """Splits each byte into bit fields, lowest bits first: [..., n] -> [..., 8 / bits, n]."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    return (data[..., None, :] >> shifts) & np.uint8((1 << bits) - 1)


def nibble_pairs(data: Bytes) -> Bytes:
    """Splits each byte into its low four bits and its high four bits: [blocks, n] -> [blocks, 2 n]."""
    return fields(data, 4).swapaxes(-1, -2).reshape(len(data), -1)


def single_bits(data: Bytes) -> Bytes:
    """Splits bytes into bits, each byte's lowest bit first: [blocks, n] -> [blocks, 8 n]."""
    return np.unpackbits(data, axis=-1, bitorder="little")


def scaled(weights: Float32, scales: Float32, minima: Float32 | None = None) -> Float32:
    """Returns [blocks, 256]: groups of weights [blocks, ...] times scales [blocks, groups], minus minima."""
    blocks, groups = scales.shape
    out = weights.reshape(blocks, groups, -1) * scales[:, :, None]
    if minima is not None:
        out = out - minima[:, :, None]
    return out.reshape(blocks, 256)


def signs(bits: Bytes) -> Float32:
    return np.where(bits == 0, np.float32(1), np.float32(-1))

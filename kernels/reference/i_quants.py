"""Quant types whose weights are points of a fixed grid. Docstrings list the parts of a block in order, where d is the
block's scale. Layouts and the order of float operations are ggml's."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from llamaclust.kernels.reference.bits import (
    Bytes,
    Float32,
    fields,
    floats16,
    nibble_pairs,
    scaled,
    signs,
    single_bits,
    words,
)
from llamaclust.kernels.reference.iq_tables import grid
from llamaclust.kernels.reference.simple_quants import IQ4_VALUES

_IQ1_DELTA = np.float32(0.125)


def _packed_signs(words32: NDArray[np.uint32]) -> Float32:
    """Unpacks signs [blocks, 4 n, 8] from words [blocks, n] with 4 x 7 bits. The eighth sign makes parity even."""
    seven = (words32[:, :, None] >> np.array([0, 7, 14, 21], np.uint32) & 127).astype(np.uint8)
    return _with_parity(seven.reshape(len(words32), -1))


def _with_parity(seven: Bytes) -> Float32:
    bits = np.unpackbits(seven[..., None], axis=-1, bitorder="little")
    bits[..., 7] = bits.sum(axis=-1) & 1
    return signs(bits)


def _plain_signs(data: Bytes) -> Float32:
    return signs(single_bits(data)).reshape(*data.shape, 8)


def _signed(points: Float32, sign: Float32) -> Float32:
    return points.reshape(sign.shape) * sign


def _half_scales(blocks: Bytes, scales: NDArray[np.integer], factor: float) -> Float32:
    return floats16(blocks, 0) * (np.float32(0.5) + scales.astype(np.float32)) * np.float32(factor)


def iq2_xxs(blocks: Bytes) -> Float32:
    """Block layout: float16 d, then per 32 weights 4 grid bytes and a word of 4 x 7 sign bits with a 4-bit scale on
    top."""
    pairs = words(blocks[:, 2:], np.uint32).reshape(-1, 8, 2)
    indices = words(blocks[:, 2:], np.uint8).reshape(-1, 8, 8)[:, :, :4].reshape(-1, 32)
    points = _signed(grid("IQ2_XXS")[indices], _packed_signs(pairs[:, :, 1]))
    return scaled(points, _half_scales(blocks, pairs[:, :, 1] >> 28, 0.25))


def iq2_xs(blocks: Bytes) -> Float32:
    """Block layout: float16 d, then 9 grid bits and 7 sign bits per 8 weights, then a 4-bit scale per 16 weights."""
    codes = words(blocks[:, 2:66], np.uint16)
    points = _signed(grid("IQ2_XS")[codes & 511], _with_parity((codes >> 9).astype(np.uint8)))
    return scaled(points, _half_scales(blocks, nibble_pairs(blocks[:, 66:]), 0.25))


def iq2_s(blocks: Bytes) -> Float32:
    """Block layout: float16 d, then for every 8 weights a grid byte, a sign byte and 2 upper grid bits (in separate
    arrays), then a 4-bit scale for every 16 weights."""
    high = fields(blocks[:, 66:74], 2).swapaxes(1, 2).reshape(-1, 32).astype(np.uint16)
    points = _signed(grid("IQ2_S")[blocks[:, 2:34] | high << 8], _plain_signs(blocks[:, 34:66]))
    return scaled(points, _half_scales(blocks, nibble_pairs(blocks[:, 74:]), 0.25))


def iq3_xxs(blocks: Bytes) -> Float32:
    """Block layout: float16 d, a grid byte for every 4 weights, then for every 32 weights a word of 4 x 7 sign bits
    with a 4-bit scale on top."""
    codes = words(blocks[:, 66:], np.uint32)
    points = _signed(grid("IQ3_XXS")[blocks[:, 2:66]], _packed_signs(codes))
    return scaled(points, _half_scales(blocks, codes >> 28, 0.5))


def iq3_s(blocks: Bytes) -> Float32:
    """Block layout: float16 d, then for every 4 weights a grid byte and a ninth grid bit (in separate arrays), then a
    sign byte for every 8 weights, then a 4-bit scale for every 32 weights."""
    high = single_bits(blocks[:, 66:74]).astype(np.uint16)
    points = _signed(grid("IQ3_S")[blocks[:, 2:66] | high << 8], _plain_signs(blocks[:, 74:106]))
    scales = 1 + 2 * nibble_pairs(blocks[:, 106:]).astype(np.float32)
    return scaled(points, floats16(blocks, 0) * scales)


def _iq1_indices(low: Bytes, high: NDArray[np.integer]) -> NDArray[np.uint16]:
    return low.astype(np.uint16) | (high.astype(np.uint16) & np.uint16(7)) << np.uint16(8)


def _delta(negative: NDArray[np.bool_]) -> Float32:
    return np.where(negative, -_IQ1_DELTA, _IQ1_DELTA)


def iq1_s(blocks: Bytes) -> Float32:
    """Block layout: float16 d, a grid byte for every 8 weights, then for every 32 weights a word of 4 x 3 grid bits, a
    3-bit scale and the sign of delta."""
    codes = words(blocks[:, 34:], np.uint16)
    high = (codes[:, :, None] >> np.array([0, 3, 6, 9], np.uint16)).reshape(-1, 32)
    points = grid("IQ1")[_iq1_indices(blocks[:, 2:34], high)].reshape(-1, 8, 32)
    points = points + _delta(codes >> 15 == 1)[:, :, None]
    return scaled(points, floats16(blocks, 0) * (2 * (codes >> 12 & 7) + 1).astype(np.float32))


def iq1_m(blocks: Bytes) -> Float32:
    """Block layout: one grid byte per 8 weights; then 4 bits per 8 weights (3 grid bits, the sign of delta); then four
    words, each with 4 x 3 scale bits and 4 bits of d."""
    codes = words(blocks[:, 48:], np.uint16)
    quarters = codes >> 12 << np.array([0, 4, 8, 12], np.uint16)
    d = np.bitwise_or.reduce(quarters, axis=1, keepdims=True).view(np.float16).astype(np.float32)
    scales = (codes[:, :, None] >> np.array([0, 3, 6, 9], np.uint16) & 7).reshape(-1, 16)
    high = nibble_pairs(blocks[:, 32:48])
    points = grid("IQ1")[_iq1_indices(blocks[:, :32], high)] + _delta(high >> 3 == 1)[:, :, None]
    return scaled(points, d * (2 * scales + 1).astype(np.float32))


def iq4_xs(blocks: Bytes) -> Float32:
    """Block layout: float16 d, the upper 2 bits of 8 scales, their lower 4 bits, 256 four-bit indices in 8 x 16 bytes.
    A scale is its six bits minus 32."""
    high = words(blocks[:, 2:4], np.uint16) >> np.arange(0, 16, 2, dtype=np.uint16) & 3
    scales = (nibble_pairs(blocks[:, 4:8]) | high << 4).astype(np.float32) - np.float32(32)
    weights = IQ4_VALUES[fields(blocks[:, 8:].reshape(-1, 8, 16), 4)]
    return scaled(weights.reshape(-1, 8, 32), floats16(blocks, 0) * scales)

"""Quant types with blocks of 256 weights and a scale for every 16 or 32 weights, and ternary types. Docstrings list the
parts of a block in order. d and dmin multiply a block's scales and minima. Layouts and float operations are ggml's."""

from __future__ import annotations

import numpy as np

from llamaclust.kernels.reference.bits import Bytes, Float32, fields, floats16, scaled


def q2_k(blocks: Bytes) -> Float32:
    """Block layout: 16 bytes with a 4-bit scale and a 4-bit minimum each, 256 two-bit weights in 2 x 32 bytes, float16
    d, float16 dmin."""
    scales = blocks[:, :16]
    weights = fields(blocks[:, 16:80].reshape(-1, 2, 32), 2).astype(np.float32)
    d, dmin = floats16(blocks, 80), floats16(blocks, 82)
    return scaled(weights, d * (scales & 15).astype(np.float32), dmin * (scales >> 4).astype(np.float32))


def q3_k(blocks: Bytes) -> Float32:
    """Block layout: the third bits of 256 weights, their two low bits, 16 six-bit scales, float16 d. A weight is its
    three bits minus 4. A scale is its six bits minus 32."""
    high = fields(blocks[:, :32], 1).reshape(-1, 256)
    low = fields(blocks[:, 32:96].reshape(-1, 2, 32), 2).reshape(-1, 256)
    weights = (low | high << 2).astype(np.float32) - np.float32(4)
    scale_low = fields(blocks[:, 96:104], 4).reshape(-1, 16)
    scale_high = fields(blocks[:, 104:108], 2).reshape(-1, 16)
    scales = (scale_low | scale_high << 4).astype(np.float32) - np.float32(32)
    return scaled(weights, floats16(blocks, 108) * scales)


def six_bit_scales(packed: Bytes) -> tuple[Float32, Float32]:
    """Returns eight scales and eight minima of 6 bits, which are packed in twelve bytes."""
    first, second, low = packed[:, :4], packed[:, 4:8], packed[:, 8:12]
    scales = np.concatenate([first & 63, low & 15 | first >> 6 << 4], axis=1)
    minima = np.concatenate([second & 63, low >> 4 | second >> 6 << 4], axis=1)
    return scales.astype(np.float32), minima.astype(np.float32)


def _q45(blocks: Bytes, weights: Bytes) -> Float32:
    scales, minima = six_bit_scales(blocks[:, 4:16])
    return scaled(weights.astype(np.float32), floats16(blocks, 0) * scales, floats16(blocks, 2) * minima)


def q4_k(blocks: Bytes) -> Float32:
    """Block layout: float16 d, float16 dmin, 12 bytes of scales, 256 four-bit weights in 4 x 32 bytes."""
    return _q45(blocks, fields(blocks[:, 16:].reshape(-1, 4, 32), 4))


def q5_k(blocks: Bytes) -> Float32:
    """Block layout: float16 d, float16 dmin, 12 bytes of scales, the fifth bits of 256 weights in 32 bytes (bit i of
    byte j is for weight 32 * i + j), their low four bits in 4 x 32 bytes."""
    low = fields(blocks[:, 48:].reshape(-1, 4, 32), 4).reshape(-1, 8, 32)
    return _q45(blocks, low | fields(blocks[:, 16:48], 1) << np.uint8(4))


def q6_k(blocks: Bytes) -> Float32:
    """Block layout: the low four bits of 256 weights in 2 x 64 bytes, their upper two bits in 2 x 32 bytes, 16 int8
    scales, float16 d."""
    low = fields(blocks[:, :128].reshape(-1, 2, 64), 4).reshape(-1, 256)
    high = fields(blocks[:, 128:192].reshape(-1, 2, 32), 2).reshape(-1, 256)
    weights = (low | high << 4).astype(np.float32) - np.float32(32)
    return scaled(weights, floats16(blocks, 208) * blocks[:, 192:208].view(np.int8).astype(np.float32))


def _ternary_digits(data: Bytes, digits: int) -> Bytes:
    """Returns the base-3 digits of byte / 256, highest digit first: [blocks, n] -> [blocks, digits * n]."""
    powers = np.array([3**i for i in range(digits)], np.uint8)[:, None]
    fractions = data[:, None, :] * powers
    return (fractions.astype(np.uint16) * 3 >> 8).astype(np.uint8).reshape(len(data), -1)


def tq1_0(blocks: Bytes) -> Float32:
    """Block layout: 160, 80 and 16 weights of -1, 0 or 1 as base-3 digits in 32, 16 and 4 bytes, then float16 d."""
    digits = [(blocks[:, :32], 5), (blocks[:, 32:48], 5), (blocks[:, 48:52], 4)]
    weights = np.concatenate([_ternary_digits(data, count) for data, count in digits], axis=1)
    return (weights.astype(np.float32) - np.float32(1)) * floats16(blocks, 52)


def tq2_0(blocks: Bytes) -> Float32:
    """Block layout: 256 two-bit weights in 2 x 32 bytes, then float16 d. No quantizer writes the value 2."""
    weights = fields(blocks[:, :64].reshape(-1, 2, 32), 2).reshape(-1, 256)
    return (weights.astype(np.float32) - np.float32(1)) * floats16(blocks, 64)

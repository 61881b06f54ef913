"""Float types, and quant types with blocks of 32 to 128 weights and few scales. Docstrings list the parts of a block in
order, where d is its scale and m its minimum. Layouts and the order of float operations are ggml's."""

from __future__ import annotations

import numpy as np

from llamaclust.kernels.reference.bits import Bytes, Float32, fields, floats16, single_bits, words

IQ4_VALUES = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)
FP4_VALUES = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.float32)
"""The values of E2M1, doubled so that they are integers. Block scales are halved in return."""


def f32(blocks: Bytes) -> Float32:
    return words(blocks, np.float32).astype(np.float32)


def f16(blocks: Bytes) -> Float32:
    return words(blocks, np.float16).astype(np.float32)


def bf16(blocks: Bytes) -> Float32:
    return (words(blocks, np.uint16).astype(np.uint32) << 16).view(np.float32)


def _nibbles(data: Bytes) -> Bytes:
    """Splits bytes [blocks, n] into weights [blocks, 2 n]: the low four bits of all bytes, then the high four bits."""
    return fields(data, 4).reshape(len(data), -1)


def q4_0(blocks: Bytes) -> Float32:
    """Block layout: float16 d, then 32 x 4 bits."""
    return (_nibbles(blocks[:, 2:]).astype(np.float32) - np.float32(8)) * floats16(blocks, 0)


def q4_1(blocks: Bytes) -> Float32:
    """Block layout: float16 d, float16 m, then 32 x 4 bits."""
    return _nibbles(blocks[:, 4:]).astype(np.float32) * floats16(blocks, 0) + floats16(blocks, 2)


def _five_bits(high: Bytes, low: Bytes) -> Float32:
    return (_nibbles(low) | single_bits(high) << 4).astype(np.float32)


def q5_0(blocks: Bytes) -> Float32:
    """Block layout: float16 d, the fifth bits of 32 weights, then 32 x 4 bits."""
    return (_five_bits(blocks[:, 2:6], blocks[:, 6:]) - np.float32(16)) * floats16(blocks, 0)


def q5_1(blocks: Bytes) -> Float32:
    """Block layout: float16 d, float16 m, the fifth bits of 32 weights, then 32 x 4 bits."""
    return _five_bits(blocks[:, 4:8], blocks[:, 8:]) * floats16(blocks, 0) + floats16(blocks, 2)


def q8_0(blocks: Bytes) -> Float32:
    """Block layout: float16 d, then 32 x int8."""
    return blocks[:, 2:].view(np.int8).astype(np.float32) * floats16(blocks, 0)


def iq4_nl(blocks: Bytes) -> Float32:
    """Block layout: float16 d, then 32 x 4 bits, which are indices of a table with uneven steps."""
    return IQ4_VALUES[_nibbles(blocks[:, 2:])] * floats16(blocks, 0)


def mxfp4(blocks: Bytes) -> Float32:
    """Block layout: exponent byte e (E8M0), then 32 x E2M1. The scale is 2^(e - 127) / 2, which is subnormal if e <
    2."""
    exponent = blocks[:, :1].astype(np.uint32)
    bits = np.where(exponent < 2, np.uint32(0x200000) << exponent, (exponent - np.uint32(1)) << np.uint32(23))
    return FP4_VALUES[_nibbles(blocks[:, 1:])] * bits.view(np.float32)


def nvfp4(blocks: Bytes) -> Float32:
    """Block layout: four scales (E4M3 without a sign), then 16 x E2M1 for each scale."""
    exponent, mantissa = (blocks[:, :4] >> 3 & 15).astype(np.int32), (blocks[:, :4] & 7).astype(np.float32)
    normal = np.ldexp(1 + mantissa / np.float32(8), exponent - 7)
    scale = np.where(exponent == 0, np.ldexp(mantissa, -9), normal) * np.float32(0.5)
    scale[(blocks[:, :4] == 0) | (blocks[:, :4] == 0x7F)] = 0
    weights = FP4_VALUES[fields(blocks[:, 4:].reshape(-1, 4, 8), 4).reshape(-1, 4, 16)]
    return (weights * scale[:, :, None]).reshape(len(blocks), 64)


def q1_0(blocks: Bytes) -> Float32:
    """Block layout: float16 d, then 128 x 1 bit. The weight is d if the bit is set, and otherwise -d."""
    return np.where(single_bits(blocks[:, 2:]) == 1, floats16(blocks, 0), -floats16(blocks, 0))

"""Simple NumPy quantizers for tests: correct block layouts without a search for the best scales."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llamaclust.kernels.reference.simple_quants import FP4_VALUES, IQ4_VALUES
from llamaclust.model.quant_types import QuantType
from support.arithmetic.quant_blocks import set_scales

Float32 = NDArray[np.float32]
Bytes = NDArray[np.uint8]


def quantize(weights: Float32, quant_type: QuantType) -> bytes:
    """Returns the bytes of `weights` [..., k] in a type's layout; k is a multiple of its block size."""
    blocks = weights.astype(np.float32).reshape(-1, quant_type.info.block_size)
    if quant_type in _OF_RANDOM_BITS:
        return _random_bits(blocks, quant_type).tobytes()
    data = QUANTIZERS[quant_type](blocks).tobytes()
    assert len(data) == len(blocks) * quant_type.info.block_bytes
    return data


_OF_RANDOM_BITS = {
    QuantType.IQ2_XXS: 53.0,
    QuantType.IQ2_XS: 56.0,
    QuantType.IQ2_S: 56.0,
    QuantType.IQ3_XXS: 142.0,
    QuantType.IQ3_S: 140.0,
    QuantType.IQ1_S: 7.2,
    QuantType.IQ1_M: 7.2,
}
"""Types without a quantizer, with the standard deviation of weights of random bits and a scale of 1."""


def _random_bits(blocks: Float32, quant_type: QuantType) -> Bytes:
    """Returns random blocks with the standard deviation of `blocks`; equal blocks give equal bytes."""
    generator = np.random.default_rng(zlib.crc32(blocks.tobytes()))
    data = generator.integers(0, 256, (len(blocks), quant_type.info.block_bytes), np.uint8)
    set_scales(quant_type, data, (0,), blocks.std(1) / _OF_RANDOM_BITS[quant_type])
    return data


def _bf16(blocks: Float32) -> NDArray[Any]:
    bits = blocks.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def _halves(values: NDArray[np.floating[Any]]) -> tuple[Bytes, Float32]:
    """Returns one value per block as float16 bytes [blocks, 2], and the rounded values [blocks, 1]."""
    halves = values.astype(np.float16).reshape(-1, 1)
    return halves.view(np.uint8), halves.astype(np.float32)


def _divide(values: Float32, by: Float32) -> Float32:
    return np.divide(values, by, out=np.zeros_like(values), where=by != 0)


def _nibbles(quants: NDArray[np.integer[Any]]) -> Bytes:
    """Packs [..., 2 n] values below 16 into [..., n] bytes, the first n into the low halves."""
    half = quants.shape[-1] // 2
    return (quants[..., :half] | quants[..., half:] << 4).astype(np.uint8)


def _q8_0(blocks: Float32) -> Bytes:
    scale, d = _halves(np.abs(blocks).max(1) / 127)
    quants = np.clip(np.rint(_divide(blocks, d)), -127, 127).astype(np.int8)
    return np.hstack([scale, quants.view(np.uint8)])


def _q4_0(blocks: Float32) -> Bytes:
    extreme = np.take_along_axis(blocks, np.abs(blocks).argmax(1)[:, None], 1)[:, 0]
    scale, d = _halves(extreme / -8)
    quants = np.clip(np.rint(_divide(blocks, d)) + 8, 0, 15).astype(np.uint8)
    return np.hstack([scale, _nibbles(quants)])


def _q4_1(blocks: Float32) -> Bytes:
    lowest = blocks.min(1)
    scale, d = _halves((blocks.max(1) - lowest) / 15)
    minimum, m = _halves(lowest)
    quants = np.clip(np.rint(_divide(blocks - m, d)), 0, 15).astype(np.uint8)
    return np.hstack([scale, minimum, _nibbles(quants)])


def _fifth_bits(quants: Bytes) -> Bytes:
    """Packs bit 4 of [blocks, 32] values into four bytes."""
    return np.packbits(quants >> 4, axis=1, bitorder="little")


def _q5_0(blocks: Float32) -> Bytes:
    extreme = np.take_along_axis(blocks, np.abs(blocks).argmax(1)[:, None], 1)[:, 0]
    scale, d = _halves(extreme / -16)
    quants = np.clip(np.rint(_divide(blocks, d)) + 16, 0, 31).astype(np.uint8)
    return np.hstack([scale, _fifth_bits(quants), _nibbles(quants & 15)])


def _q5_1(blocks: Float32) -> Bytes:
    lowest = blocks.min(1)
    scale, d = _halves((blocks.max(1) - lowest) / 31)
    minimum, m = _halves(lowest)
    quants = np.clip(np.rint(_divide(blocks - m, d)), 0, 31).astype(np.uint8)
    return np.hstack([scale, minimum, _fifth_bits(quants), _nibbles(quants & 15)])


def _bit_pairs(quants: Bytes) -> Bytes:
    """Packs values [blocks, 16, 16] below 4 into [blocks, 64] bytes: 128 into 32, the first 32 into the lowest bits."""
    parts = quants.reshape(-1, 2, 4, 32) << np.array([0, 2, 4, 6], np.uint8)[:, None]
    packed: Bytes = parts.sum(2, dtype=np.uint8).reshape(-1, 64)
    return packed


def _q2_k(blocks: Float32) -> Bytes:
    parts = blocks.reshape(-1, 16, 16)
    lows = np.minimum(parts.min(2), 0)
    steps = (parts.max(2) - lows) / 3
    scale, d = _halves(steps.max(1) / 15)
    minimum, dmin = _halves((-lows).max(1) / 15)
    scales = np.clip(np.rint(_divide(steps, d)), 0, 15).astype(np.uint8)
    mins = np.clip(np.rint(_divide(-lows, dmin)), 0, 15).astype(np.uint8)
    quants = np.clip(np.rint(_divide(parts + (dmin * mins)[..., None], (d * scales)[..., None])), 0, 3).astype(np.uint8)
    return np.hstack([scales | mins << 4, _bit_pairs(quants), scale, minimum])


def _q3_k(blocks: Float32) -> Bytes:
    parts = blocks.reshape(-1, 16, 16)
    steps = np.abs(parts).max(2) / 3.5
    scale, d = _halves(steps.max(1) / -32)
    scales = (np.clip(np.rint(_divide(steps, d)), -32, 31) + 32).astype(np.uint8)
    step = (d * (scales.astype(np.float32) - 32))[..., None]
    quants = np.clip(np.rint(_divide(parts, step)) + 4, 0, 7).astype(np.uint8)
    third = ((quants >> 2).reshape(-1, 8, 32) << np.arange(8, dtype=np.uint8)[:, None]).sum(1, dtype=np.uint8)
    upper = (scales >> 4).reshape(-1, 4, 4) << np.array([0, 2, 4, 6], np.uint8)[:, None]
    return np.hstack([third, _bit_pairs(quants & 3), _nibbles(scales & 15), upper.sum(1, dtype=np.uint8), scale])


def _with_mins(blocks: Float32, greatest: int) -> tuple[list[Bytes], Bytes]:
    """Returns scales and mins of 32 weights as in Q4_K and Q5_K, and quants [blocks, 8, 32] up to `greatest`."""
    parts = blocks.reshape(-1, 8, 32)
    lows = np.minimum(parts.min(2), 0)
    steps = (parts.max(2) - lows) / greatest
    scale, d = _halves(steps.max(1) / 63)
    minimum, dmin = _halves((-lows).max(1) / 63)
    scales = np.clip(np.rint(_divide(steps, d)), 0, 63).astype(np.uint8)
    mins = np.clip(np.rint(_divide(-lows, dmin)), 0, 63).astype(np.uint8)
    step, offset = (d * scales)[..., None], (dmin * mins)[..., None]
    quants = np.clip(np.rint(_divide(parts + offset, step)), 0, greatest).astype(np.uint8)
    packed = np.hstack(
        [
            scales[:, :4] | (scales[:, 4:] >> 4) << 6,
            mins[:, :4] | (mins[:, 4:] >> 4) << 6,
            (scales[:, 4:] & 15) | (mins[:, 4:] & 15) << 4,
        ]
    ).astype(np.uint8)
    return [scale, minimum, packed], quants


def _q4_k(blocks: Float32) -> Bytes:
    scales, quants = _with_mins(blocks, 15)
    return np.hstack([*scales, _nibbles(quants.reshape(-1, 4, 64)).reshape(-1, 128)])


def _q5_k(blocks: Float32) -> Bytes:
    scales, quants = _with_mins(blocks, 31)
    high = ((quants >> 4) << np.arange(8, dtype=np.uint8)[:, None]).sum(1, dtype=np.uint8)
    return np.hstack([*scales, high, _nibbles((quants & 15).reshape(-1, 4, 64)).reshape(-1, 128)])


def _q6_k(blocks: Float32) -> Bytes:
    parts = blocks.reshape(-1, 16, 16)
    steps = np.abs(parts).max(2) / 31
    scale, d = _halves(steps.max(1) / 127)
    scales = np.clip(np.rint(_divide(steps, d)), -128, 127).astype(np.int8)
    step = (d * scales)[..., None]
    quants = np.clip(np.rint(_divide(parts, step)) + 32, 0, 63).astype(np.uint8).reshape(-1, 2, 4, 32)
    low, high = quants & 15, quants >> 4
    low_bytes = np.concatenate([low[:, :, 0] | low[:, :, 2] << 4, low[:, :, 1] | low[:, :, 3] << 4], axis=2)
    high_bytes = high[:, :, 0] | high[:, :, 1] << 2 | high[:, :, 2] << 4 | high[:, :, 3] << 6
    return np.hstack([low_bytes.reshape(-1, 128), high_bytes.reshape(-1, 64), scales.view(np.uint8), scale])


def _nearest(values: Float32, scaled: Float32) -> Bytes:
    """Returns the index of the nearest of ascending `values` for each number of `scaled`."""
    return np.searchsorted((values[1:] + values[:-1]) / 2, scaled).astype(np.uint8)


def _iq4_nl(blocks: Float32) -> Bytes:
    scale, d = _halves(np.abs(blocks).max(1) / 113)
    return np.hstack([scale, _nibbles(_nearest(IQ4_VALUES, _divide(blocks, d)))])


def _iq4_xs(blocks: Float32) -> Bytes:
    parts = blocks.reshape(-1, 8, 32)
    steps = np.abs(parts).max(2) / 113
    scale, d = _halves(steps.max(1) / -32)
    scales = np.clip(np.rint(_divide(steps, d)), -32, 31)
    quants = _nearest(IQ4_VALUES, _divide(parts, (d * scales)[..., None]))
    biased = (scales + 32).astype(np.uint8)
    high = ((biased >> 4).reshape(-1, 2, 4) << np.array([0, 2, 4, 6], np.uint8)).sum(2, dtype=np.uint8)
    return np.hstack([scale, high, biased[:, ::2] & 15 | biased[:, 1::2] << 4, _nibbles(quants).reshape(-1, 128)])


def _mxfp4(blocks: Float32) -> Bytes:
    exponents = np.frexp(np.abs(blocks).max(1, keepdims=True))[1] - 3
    scaled = np.ldexp(blocks, 1 - exponents)
    codes = _nearest(FP4_VALUES[:8], np.abs(scaled)) | np.where(scaled < 0, 8, 0).astype(np.uint8)
    return np.hstack([(exponents + 127).astype(np.uint8), _nibbles(codes)])


def _ternary(blocks: Float32) -> tuple[Bytes, Bytes]:
    """Returns scales with the least error for normal weights, and weights rounded to -1, 0 and 1, plus 1."""
    scale, d = _halves(1.22 * np.sqrt(np.square(blocks).mean(1)))
    return scale, (np.clip(np.rint(_divide(blocks, d)), -1, 1) + 1).astype(np.uint8)


def _tq2_0(blocks: Float32) -> Bytes:
    scale, quants = _ternary(blocks)
    pairs = quants.reshape(-1, 2, 4, 32) << np.array([0, 2, 4, 6], np.uint8)[:, None]
    return np.hstack([pairs.sum(2, dtype=np.uint8).reshape(-1, 64), scale])


def _tq1_0(blocks: Float32) -> Bytes:
    scale, quants = _ternary(blocks)
    data = []
    for start, end, digits in ((0, 160, 5), (160, 240, 5), (240, 256, 4)):
        parts = quants[:, start:end].reshape(len(quants), digits, -1)
        numbers = sum(3 ** (4 - n) * parts[:, n].astype(np.int64) for n in range(digits))
        data.append(((256 * numbers + 242) // 243).astype(np.uint8))
    return np.hstack([*data, scale])


QUANTIZERS: dict[QuantType, Callable[[Float32], NDArray[Any]]] = {
    QuantType.F32: lambda blocks: blocks,
    QuantType.F16: lambda blocks: blocks.astype(np.float16),
    QuantType.BF16: _bf16,
    QuantType.Q8_0: _q8_0,
    QuantType.Q4_0: _q4_0,
    QuantType.Q4_1: _q4_1,
    QuantType.Q5_0: _q5_0,
    QuantType.Q5_1: _q5_1,
    QuantType.Q2_K: _q2_k,
    QuantType.Q3_K: _q3_k,
    QuantType.Q4_K: _q4_k,
    QuantType.Q5_K: _q5_k,
    QuantType.Q6_K: _q6_k,
    QuantType.IQ4_NL: _iq4_nl,
    QuantType.IQ4_XS: _iq4_xs,
    QuantType.MXFP4: _mxfp4,
    QuantType.TQ2_0: _tq2_0,
    QuantType.TQ1_0: _tq1_0,
}

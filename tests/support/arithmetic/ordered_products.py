"""Bit-exact products of quantized weights in NumPy, in the order of docs/internals/numerics.md: exact integer sums in a
segment, then fused multiply-adds in k order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llamaclust.kernels.reference.dequantize import dequantize
from llamaclust.model.quant_types import QuantType

Float32 = NDArray[np.float32]
Integers = NDArray[np.int64]
Bytes = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Segments:
    """Weights [rows, segments, width] as integers: scale * quants - min * mins, with one min per segment or
    sub-block."""

    scales: Float32  # [rows, segments]
    quants: Integers  # [rows, segments, width], multiplied by sub-block scales
    mins: Float32 | None  # [rows, segments]
    sub_mins: Integers | None  # [rows, segments, sub-blocks]


@dataclass(frozen=True, slots=True)
class Activations:
    """Activations [tokens, segments, width] in eight bits."""

    scales: Float32  # [tokens, segments]
    quants: Integers  # [tokens, segments, width]


def halves(blocks: Bytes, place: int) -> Float32:
    return np.ascontiguousarray(blocks[..., place : place + 2]).view(np.float16)[..., 0].astype(np.float32)


def nibbles(data: Bytes) -> Integers:
    return np.concatenate([data & 15, data >> 4], axis=-1).astype(np.int64)


def q4_0(blocks: Bytes) -> Segments:
    return Segments(halves(blocks, 0), nibbles(blocks[..., 2:]) - 8, None, None)


def q4_1(blocks: Bytes) -> Segments:
    return Segments(halves(blocks, 0), nibbles(blocks[..., 4:]), halves(blocks, 2), None)


def five_bits(high: Bytes, low: Bytes) -> Integers:
    bits = np.unpackbits(np.ascontiguousarray(high), axis=-1, bitorder="little")
    return nibbles(low) | bits.astype(np.int64) << 4


def q5_0(blocks: Bytes) -> Segments:
    return Segments(halves(blocks, 0), five_bits(blocks[..., 2:6], blocks[..., 6:]) - 16, None, None)


def q5_1(blocks: Bytes) -> Segments:
    return Segments(halves(blocks, 0), five_bits(blocks[..., 4:8], blocks[..., 8:]), halves(blocks, 2), None)


def q8_0(blocks: Bytes) -> Segments:
    return Segments(halves(blocks, 0), blocks[..., 2:].view(np.int8).astype(np.int64), None, None)


def bit_pairs(data: Bytes) -> Integers:
    """Decodes bytes [..., 64] to quants [..., 16 sub-blocks, 16]; 32 bytes hold 128 quants, the first 32 in the lowest
    bits."""
    shape = data.shape[:-1]
    pairs: Integers = data.reshape(*shape, 2, 1, 32).astype(np.int64) >> np.array([0, 2, 4, 6])[:, None] & 3
    return pairs.reshape(*shape, 16, 16)


def q2_k(blocks: Bytes) -> Segments:
    scales, sub_mins = (blocks[..., :16] & 15).astype(np.int64), (blocks[..., :16] >> 4).astype(np.int64)
    quants = (bit_pairs(blocks[..., 16:80]) * scales[..., None]).reshape(*blocks.shape[:-1], 256)
    return Segments(halves(blocks, 80), quants, halves(blocks, 82), sub_mins)


def q3_k(blocks: Bytes) -> Segments:
    shape = blocks.shape[:-1]
    third = blocks[..., None, :32].astype(np.int64) >> np.arange(8)[:, None] & 1
    quants = (bit_pairs(blocks[..., 32:96]) | third.reshape(*shape, 16, 16) << 2) - 4
    upper = blocks[..., None, 104:108].astype(np.int64) >> np.array([0, 2, 4, 6])[:, None] & 3
    scales = (nibbles(blocks[..., 96:104]) | upper.reshape(*shape, 16) << 4) - 32
    return Segments(halves(blocks, 108), (quants * scales[..., None]).reshape(*shape, 256), None, None)


def with_six_bit_scales(blocks: Bytes, quants: Integers) -> Segments:
    """Decodes blocks that begin with scale, min and 12 bytes of sub-block scales and mins; quants are [..., 8, 32]."""
    packed = blocks[..., 4:16].astype(np.int64)
    low, high = packed[..., :8] & 63, packed[..., :8] >> 6
    scales = np.concatenate([low[..., :4], packed[..., 8:] & 15 | high[..., :4] << 4], axis=-1)
    sub_mins = np.concatenate([low[..., 4:], packed[..., 8:] >> 4 | high[..., 4:] << 4], axis=-1)
    scaled = (quants * scales[..., None]).reshape(*blocks.shape[:-1], 256)
    return Segments(halves(blocks, 0), scaled, halves(blocks, 2), sub_mins)


def q4_k(blocks: Bytes) -> Segments:
    shape = blocks.shape[:-1]
    return with_six_bit_scales(blocks, nibbles(blocks[..., 16:].reshape(*shape, 4, 32)).reshape(*shape, 8, 32))


def q5_k(blocks: Bytes) -> Segments:
    shape = blocks.shape[:-1]
    low = nibbles(blocks[..., 48:].reshape(*shape, 4, 32)).reshape(*shape, 8, 32)
    high = blocks[..., None, 16:48].astype(np.int64) >> np.arange(8)[:, None] & 1
    return with_six_bit_scales(blocks, low | high << 4)


def q6_k(blocks: Bytes) -> Segments:
    shape = blocks.shape[:-1]
    low = nibbles(blocks[..., :128].reshape(*shape, 2, 64)).reshape(*shape, 2, 4, 32)
    pairs = blocks[..., 128:192].reshape(*shape, 2, 1, 32).astype(np.int64)
    high = pairs >> np.array([0, 2, 4, 6])[:, None] & 3
    quants = (low | high << 4).reshape(*shape, 16, 16) - 32
    scales = blocks[..., 192:208].view(np.int8).astype(np.int64)
    return Segments(halves(blocks, 208), (quants * scales[..., None]).reshape(*shape, 256), None, None)


IQ4_VALUES = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113])


def iq4_nl(blocks: Bytes) -> Segments:
    return Segments(halves(blocks, 0), IQ4_VALUES[nibbles(blocks[..., 2:])], None, None)


def iq4_xs(blocks: Bytes) -> Segments:
    shape = blocks.shape[:-1]
    high = np.unpackbits(blocks[..., 2:4], axis=-1, bitorder="little").astype(np.int64).reshape(*shape, 8, 2)
    low = np.stack([blocks[..., 4:8] & 15, blocks[..., 4:8] >> 4], axis=-1).astype(np.int64).reshape(*shape, 8)
    scales = (low | high[..., 0] << 4 | high[..., 1] << 5) - 32
    values = IQ4_VALUES[nibbles(blocks[..., 8:].reshape(*shape, 8, 16))]
    return Segments(halves(blocks, 0), (values * scales[..., None]).reshape(*shape, 256), None, None)


def mxfp4(blocks: Bytes) -> Segments:
    twice = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12])
    scales = np.ldexp(np.float32(1), blocks[..., 0].astype(np.int32) - 128)
    return Segments(scales, twice[nibbles(blocks[..., 1:])], None, None)


def tq2_0(blocks: Bytes) -> Segments:
    pairs = blocks[..., :64].reshape(*blocks.shape[:-1], 2, 1, 32).astype(np.int64)
    quants = (pairs >> np.array([0, 2, 4, 6])[:, None] & 3).reshape(*blocks.shape[:-1], 256)
    return Segments(halves(blocks, 64), quants - 1, None, None)


def tq1_0(blocks: Bytes) -> Segments:
    """Decodes TQ1_0: the first digit of a byte b is floor(3 b / 256), the next that of 3 b modulo 256."""
    parts = []
    for start, end, digits in ((0, 32, 5), (32, 48, 5), (48, 52, 4)):
        rest = blocks[..., start:end].astype(np.int64)
        for _ in range(digits):
            parts.append(3 * rest // 256)
            rest = 3 * rest % 256
    return Segments(halves(blocks, 52), np.concatenate(parts, axis=-1) - 1, None, None)


def on_a_grid(quant_type: QuantType, unit: float) -> Callable[[Bytes], Segments]:
    """Builds a decoder of weights that are integer multiples of a block's scale times `unit`, as in the reference."""

    def decode(blocks: Bytes) -> Segments:
        scales = (iq1_m_scales(blocks) if quant_type is QuantType.IQ1_M else halves(blocks, 0)) * np.float32(unit)
        weights = dequantize(quant_type, blocks.tobytes(), scales.size * 256).reshape(*scales.shape, 256)
        return Segments(scales, np.rint(weights / scales[..., None]).astype(np.int64), None, None)

    return decode


def iq1_m_scales(blocks: Bytes) -> Float32:
    quarters = (blocks[..., 49::2] >> 4).astype(np.uint16) << np.array([0, 4, 8, 12], np.uint16)
    bits: NDArray[np.uint16] = quarters.sum(-1, dtype=np.uint16)
    return bits.view(np.float16).astype(np.float32)


DECODERS = {
    QuantType.Q4_0: q4_0,
    QuantType.Q4_1: q4_1,
    QuantType.Q5_0: q5_0,
    QuantType.Q5_1: q5_1,
    QuantType.Q8_0: q8_0,
    QuantType.Q2_K: q2_k,
    QuantType.Q3_K: q3_k,
    QuantType.Q4_K: q4_k,
    QuantType.Q5_K: q5_k,
    QuantType.Q6_K: q6_k,
    QuantType.IQ4_NL: iq4_nl,
    QuantType.IQ4_XS: iq4_xs,
    QuantType.MXFP4: mxfp4,
    QuantType.TQ2_0: tq2_0,
    QuantType.TQ1_0: tq1_0,
    QuantType.IQ2_XXS: on_a_grid(QuantType.IQ2_XXS, 1 / 8),
    QuantType.IQ2_XS: on_a_grid(QuantType.IQ2_XS, 1 / 8),
    QuantType.IQ2_S: on_a_grid(QuantType.IQ2_S, 1 / 8),
    QuantType.IQ3_XXS: on_a_grid(QuantType.IQ3_XXS, 1 / 2),
    QuantType.IQ3_S: on_a_grid(QuantType.IQ3_S, 1),
    QuantType.IQ1_S: on_a_grid(QuantType.IQ1_S, 1 / 8),
    QuantType.IQ1_M: on_a_grid(QuantType.IQ1_M, 1 / 8),
}


def segments_of(quant_type: QuantType, data: bytes, rows: int) -> Segments:
    width = quant_type.info.block_bytes
    return DECODERS[quant_type](np.frombuffer(data, np.uint8).reshape(rows, -1, width))


def activations_of(x: Float32, width: int) -> Activations:
    """Quantizes finite x [tokens, cols]: scale = maximum / 127, q = x * (127 / maximum), rounded half to even."""
    parts = x.reshape(len(x), -1, width)
    maximum = np.abs(parts).max(axis=-1)
    counts = maximum >= np.float32(2.0**-118)
    inverse = np.where(counts, np.float32(127) / np.where(counts, maximum, 1), 0).astype(np.float32)
    quants = np.rint(parts * inverse[..., None]).astype(np.int64)
    return Activations(np.where(counts, maximum / np.float32(127), 0).astype(np.float32), quants)


def fma(a: Float32, b: Float32, c: Float32) -> Float32:
    """Rounds twice, but with 64 bits in between: about one result in 2^40 differs from a fused multiply-add."""
    return (a.astype(np.longdouble) * b.astype(np.longdouble) + c.astype(np.longdouble)).astype(np.float32)


def ordered_products(weights: Segments, activations: Activations) -> Float32:
    """Returns products [tokens, rows]."""
    total = np.zeros((len(activations.scales), len(weights.scales)), np.float32)
    for s in range(weights.scales.shape[1]):
        a, q = activations.scales[:, None, s], activations.quants[:, s]
        sums = (q @ weights.quants[:, s].T).astype(np.float32)
        total = fma(weights.scales[None, :, s] * a, sums, total)
        if weights.mins is not None and weights.sub_mins is not None:
            sub_sums = q.reshape(len(q), weights.sub_mins.shape[-1], -1).sum(axis=-1)
            offsets = -(sub_sums @ weights.sub_mins[:, s].T).astype(np.float32)
            total = fma(weights.mins[None, :, s] * a, offsets, total)
        elif weights.mins is not None:
            total = fma(weights.mins[None, :, s], a * q.sum(-1, keepdims=True).astype(np.float32), total)
    return total

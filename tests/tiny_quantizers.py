"""Simple block quantizers in NumPy, for models that tests make: correct layouts, no search for the best scales."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from quant_blocks import set_scales

from llamaclust.model.quant_types import QuantType

Float32 = NDArray[np.float32]
Bytes = NDArray[np.uint8]


def quantize(weights: Float32, quant_type: QuantType) -> bytes:
    """The bytes of `weights` [..., k] in a type's layout; k a multiple of its block size."""
    blocks = weights.astype(np.float32).reshape(-1, quant_type.info.block_size)
    if quant_type in _OF_RANDOM_BITS:
        return _random_bits(blocks, quant_type).tobytes()
    data = _QUANTIZERS[quant_type](blocks).tobytes()
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
"""Types without a quantizer here, and the deviation of their weights where all bits are random and the scale is 1."""


def _random_bits(blocks: Float32, quant_type: QuantType) -> Bytes:
    """Blocks that have nothing of `blocks` but their deviation; the same for the same."""
    generator = np.random.default_rng(zlib.crc32(blocks.tobytes()))
    data = generator.integers(0, 256, (len(blocks), quant_type.info.block_bytes), np.uint8)
    set_scales(quant_type, data, (0,), blocks.std(1) / _OF_RANDOM_BITS[quant_type])
    return data


def _bf16(blocks: Float32) -> NDArray[Any]:
    bits = blocks.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def _halves(values: NDArray[np.floating[Any]]) -> tuple[Bytes, Float32]:
    """float16 bytes [blocks, 2] of one value a block, and the values as they will be read back [blocks, 1]."""
    halves = values.astype(np.float16).reshape(-1, 1)
    return halves.view(np.uint8), halves.astype(np.float32)


def _divide(values: Float32, by: Float32) -> Float32:
    return np.divide(values, by, out=np.zeros_like(values), where=by != 0)


def _nibbles(quants: NDArray[np.integer[Any]]) -> Bytes:
    """[..., 2 n] values below 16 in [..., n] bytes: the first n in the low halves, the others in the high."""
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


def _q4_k(blocks: Float32) -> Bytes:
    parts = blocks.reshape(-1, 8, 32)
    lows = np.minimum(parts.min(2), 0)
    steps = (parts.max(2) - lows) / 15
    scale, d = _halves(steps.max(1) / 63)
    minimum, dmin = _halves((-lows).max(1) / 63)
    scales = np.clip(np.rint(_divide(steps, d)), 0, 63).astype(np.uint8)
    mins = np.clip(np.rint(_divide(-lows, dmin)), 0, 63).astype(np.uint8)
    step, offset = (d * scales)[..., None], (dmin * mins)[..., None]
    quants = np.clip(np.rint(_divide(parts + offset, step)), 0, 15).astype(np.uint8)
    packed = [
        scales[:, :4] | (scales[:, 4:] >> 4) << 6,
        mins[:, :4] | (mins[:, 4:] >> 4) << 6,
        (scales[:, 4:] & 15) | (mins[:, 4:] & 15) << 4,
    ]
    pairs = _nibbles(quants.reshape(-1, 4, 64)).reshape(-1, 128)
    return np.hstack([scale, minimum, *packed, pairs])


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


_QUANTIZERS: dict[QuantType, Callable[[Float32], NDArray[Any]]] = {
    QuantType.F32: lambda blocks: blocks,
    QuantType.F16: lambda blocks: blocks.astype(np.float16),
    QuantType.BF16: _bf16,
    QuantType.Q8_0: _q8_0,
    QuantType.Q4_0: _q4_0,
    QuantType.Q4_1: _q4_1,
    QuantType.Q4_K: _q4_k,
    QuantType.Q6_K: _q6_k,
}

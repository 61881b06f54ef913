"""Quantizes weights to the blocks of a GGUF file. The bytes do not depend on chunks, threads or the feature level."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from llamaclust.kernels import _native
from llamaclust.kernels.backend import Float32
from llamaclust.kernels.packed.load import to_float
from llamaclust.kernels.packed.weights import SUPPORTED_TYPES
from llamaclust.model.quant_types import QuantType

QUANTIZED_TYPES = SUPPORTED_TYPES

MOST_SCALED = 65504.0
"""The largest float16 value. Larger weights cannot be quantized, because block scales are float16."""

_LEAST_IMPORTANCE = 1e-6

_CAST_NUMBERS = {QuantType.F32: 0, QuantType.F16: 1, QuantType.BF16: 2, QuantType.Q8_0: 3}
"""Numbers of the types in the native module (kernels/cpu/native/runtime/dtype_cast.h)."""


def narrowed(values: NDArray[Any], stored: QuantType, quant_type: QuantType) -> NDArray[np.uint8] | None:
    """Rounds contiguous `values` [..., k] to `quant_type` (F32, F16, BF16 or Q8_0), where k is a multiple of the block
    size. Returns None if a float16 result (an F16 value or a Q8_0 scale) is not finite."""
    out = np.empty(values.size // quant_type.info.block_size * quant_type.info.block_bytes, np.uint8)
    numbers = _CAST_NUMBERS[stored], _CAST_NUMBERS[quant_type]
    return out if _native.cast_dtype(values.reshape(-1).view(np.uint8), numbers[0], out, numbers[1]) else None


def to_floats(quant_type: QuantType, data: bytearray, width: int) -> Float32:
    stored = np.frombuffer(data, np.uint8)
    if quant_type in (QuantType.F32, QuantType.F16, QuantType.BF16):
        return to_float(quant_type, stored).reshape(-1, width)
    matrix = _native.PackedMatrix(int(quant_type), len(data) // quant_type.info.row_bytes(width), width)
    matrix.pack_rows(0, stored)
    return _native.dequantize("", matrix)


def most_of(quant_type: QuantType) -> float:
    return float(np.finfo(np.float32).max) if quant_type in (QuantType.F32, QuantType.BF16) else MOST_SCALED


def quantize(
    quant_type: QuantType, x: Float32, importance: Float32 | None, feature_level: str = ""
) -> NDArray[np.uint8]:
    """Quantizes weights [rows, width] with magnitudes up to `most_of(quant_type)`. `importance` [width] has mean 1."""
    match quant_type:
        case QuantType.F32:
            return x.view(np.uint8)
        case QuantType.F16:
            return x.astype(np.float16).view(np.uint8)
        case QuantType.BF16:
            bits = x.view(np.uint32)
            return ((bits + (np.uint32(0x7FFF) + (bits >> 16 & 1))) >> 16).astype(np.uint16).view(np.uint8)
    out = np.empty((len(x), quant_type.info.row_bytes(x.shape[1])), np.uint8)
    _native.quantize_rows(feature_level, int(quant_type), x, importance, out)
    return out


def as_importance(means: Float32) -> Float32:
    mean = float(means.mean(dtype=np.float64))
    if mean <= 0:
        return np.ones_like(means)
    relative: Float32 = np.maximum(means / np.float32(mean), np.float32(_LEAST_IMPORTANCE))
    return relative

"""Dequantizes all quant types to float32, with the same float operations in the same order as ggml."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from llamaclust.kernels.reference import i_quants, k_quants, simple_quants
from llamaclust.kernels.reference.bits import Bytes, Float32
from llamaclust.model.quant_types import QuantType

_MODULES = (simple_quants, k_quants, i_quants)

_DEQUANTIZERS: dict[QuantType, Callable[[Bytes], Float32]] = {
    kind: vars(module)[kind.name.lower()]
    for kind in QuantType
    for module in _MODULES
    if kind.name.lower() in vars(module)
}

SUPPORTED_TYPES = frozenset(_DEQUANTIZERS)


def dequantize(quant_type: QuantType, data: bytes | bytearray | Bytes, count: int) -> Float32:
    info = quant_type.info
    raw = np.frombuffer(data, np.uint8)
    assert count % info.block_size == 0 and len(raw) == info.row_bytes(count), (quant_type, count, len(raw))
    blocks = raw.reshape(-1, info.block_bytes)
    return _DEQUANTIZERS[quant_type](blocks).reshape(count)

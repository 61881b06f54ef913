"""Weights as checkpoints store them to weights as model files do, natively and without the interpreter's lock."""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llamaclust.kernels import _native
from llamaclust.model.quant_types import QuantType


class StoredType(IntEnum):
    """The native module's numbers (kernels/cpu/native/runtime/dtype_cast.h)."""

    F32 = 0
    F16 = 1
    BF16 = 2


_KINDS = {QuantType.F32: 0, QuantType.F16: 1, QuantType.BF16: 2, QuantType.Q8_0: 3}
NARROW_TYPES = tuple(_KINDS)


def narrowed(values: NDArray[Any], stored: StoredType, quant_type: QuantType) -> NDArray[np.uint8] | None:
    """The bytes of `values` [..., k] in one of `NARROW_TYPES`, rounded to nearest; None where a number is none, is
    infinite, or does not fit a float16 that is wanted.

    k is a multiple of the type's block; `values` are contiguous.
    """
    size = values.size // quant_type.info.block_size * quant_type.info.block_bytes
    out = np.empty(size, np.uint8)
    fits = _native.cast_dtype(values.reshape(-1).view(np.uint8), int(stored), out, _KINDS[quant_type])
    return out if fits else None

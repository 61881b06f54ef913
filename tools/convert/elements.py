"""Converts element types of checkpoints to those of GGUF files, a range of rows at a time."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from llamaclust.core.errors import ModelFileError
from llamaclust.kernels.cpu.dtype_cast import StoredType, narrowed
from llamaclust.model.quant_types import QuantType
from llamaclust.tools.convert.lazy import Array, Storage, as_floats

OUTPUT_TYPES: Final = {
    "f32": QuantType.F32,
    "f16": QuantType.F16,
    "bf16": QuantType.BF16,
    "q8_0": QuantType.Q8_0,
}
_SAME: Final = {Storage.F32: QuantType.F32, Storage.F16: QuantType.F16, Storage.BF16: QuantType.BF16}
_STORED: Final = {
    Storage.F32: StoredType.F32,
    Storage.F16: StoredType.F16,
    Storage.BF16: StoredType.BF16,
}
_LARGEST_F16: Final = 65504


def encoded(values: Array, storage: Storage, quant_type: QuantType, origin: str) -> memoryview:
    """The bytes of some rows in a type of `OUTPUT_TYPES`. ModelFileError where float16 cannot hold a number."""
    values = np.ascontiguousarray(values)
    if _SAME.get(storage) is quant_type:
        return values.data.cast("B")
    if storage not in _STORED:
        values, storage = as_floats(values, storage), Storage.F32
    found = narrowed(values, _STORED[storage], quant_type)
    if found is None:
        raise _range_error(as_floats(values, storage), quant_type, origin)
    return found.data


def _range_error(values: NDArray[np.float32], quant_type: QuantType, origin: str) -> ModelFileError:
    if not np.isfinite(values).all():
        return ModelFileError(f"{origin}: holds what is no finite number; only --type f32 or bf16 can keep that")
    what = f"{np.abs(values).max():g} does not fit {quant_type.name.lower()}"
    return ModelFileError(f"{origin}: {what}, whose numbers end at {_LARGEST_F16}; convert with --type bf16")

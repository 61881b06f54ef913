from __future__ import annotations

from enum import Enum
from typing import Any, Final

import numpy as np

MAX_DIMENSIONS: Final = 5


class Storage(Enum):
    """Number types in checkpoint files, with their NumPy types. BF16 is held as uint16, because NumPy lacks it."""

    F64 = np.dtype("<f8")
    F32 = np.dtype("<f4")
    F16 = np.dtype("<f2")
    BF16 = np.dtype("<u2")
    I64 = np.dtype("<i8")
    I32 = np.dtype("<i4")
    I16 = np.dtype("<i2")
    I8 = np.dtype("<i1")
    U8 = np.dtype("<u1")
    BOOL = np.dtype("?")

    @property
    def dtype(self) -> np.dtype[Any]:
        value: np.dtype[Any] = self.value
        return value

    @property
    def is_real(self) -> bool:
        return self in (Storage.F64, Storage.F32, Storage.F16, Storage.BF16)

"""Launches that begin while the previous kernel runs (CUDA's programmatic dependent launch, which CuPy lacks)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from llamaclust.kernels.cuda.runtime.device import Launch

OLDEST = 90

_KERNELS = (
    *(f"{module}.gemv_" for module in ("matmul.k", "matmul.simple", "matmul.grid", "matmul.float")),
    *("elementwise.norms.add_rms_norm", "elementwise.quantize.", "attention.few.few_", "attention.rows.merge"),
)
_SERIALIZATION = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION


def overlaps(kernel: str) -> bool:
    return kernel.startswith(_KERNELS)


class _Attribute(ctypes.Structure):
    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int), ("rest", ctypes.c_int * 15))


class _Config(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("attribute_count", ctypes.c_uint),
    )


class OverlappingLauncher:
    def __init__(self, error: type[Exception]) -> None:
        self._error = error
        self._attribute = _Attribute(_SERIALIZATION, 0, 1)

    @cached_property
    def _driver(self) -> Any:
        return ctypes.CDLL("libcuda.so.1")

    def launch(self, function: int, launch: Launch, stream: int) -> None:
        values = [np.array(one) for one in launch.args]
        config = _Config(
            (ctypes.c_uint * 3)(*launch.grid),
            (ctypes.c_uint * 3)(*launch.block),
            launch.shared_bytes,
            stream,
            ctypes.pointer(self._attribute),
            1,
        )
        status = self._driver.cuLaunchKernelEx(
            ctypes.byref(config), ctypes.c_void_p(function), _addresses(values), None
        )
        if status != 0:
            raise self._error(status)


def _addresses(values: Sequence[np.ndarray[Any, Any]]) -> Any:
    return (ctypes.c_void_p * len(values))(*(value.ctypes.data for value in values))

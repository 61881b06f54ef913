"""A fixed random matrix for the quantizers. Recorder of ggml's errors (LIBRARY is its libggml-base.so):

python tests/support/arithmetic/quantize_matrix.py LIBRARY > tests/data/quantize/errors.json
"""

from __future__ import annotations

import ctypes
import json
import sys

import numpy as np
from numpy.typing import NDArray

from llamaclust.kernels.cpu.quantize import QUANTIZED_TYPES
from llamaclust.kernels.reference.dequantize import dequantize
from llamaclust.model.quant_types import QuantType
from llamaclust.tools.quantize.mixes import FLOATS, NEEDS_IMPORTANCE

Float32 = NDArray[np.float32]

SEED, ROWS, COLS = 5, 8, 1024
TYPES = [kind for kind in QUANTIZED_TYPES if kind not in FLOATS]


def matrix() -> tuple[Float32, Float32]:
    """Returns weights [ROWS, COLS] with some outliers, and an importance [COLS] whose mean is 1."""
    print("seed", SEED, file=sys.stderr)
    random = np.random.default_rng(SEED)
    x = 0.02 * random.standard_normal((ROWS, COLS)) * np.exp(0.3 * random.standard_normal((ROWS, COLS)))
    importance = np.exp(1.2 * random.standard_normal(COLS))
    return x.astype(np.float32), (importance / importance.mean()).astype(np.float32)


def cases() -> list[tuple[QuantType, bool]]:
    """Returns each type with an importance, and without one if the type does not need it."""
    return [(kind, has) for kind in TYPES for has in (False, True) if has or kind not in NEEDS_IMPORTANCE]


def relative_error(quant_type: QuantType, data: bytes, x: Float32, importance: Float32 | None) -> float:
    """Returns the root mean square error relative to the weights' root mean square, weighted by importance."""
    miss = dequantize(quant_type, data, x.size).reshape(x.shape) - x
    w = np.ones(x.shape[1], np.float32) if importance is None else importance
    return float(np.sqrt((w * miss**2).sum(dtype=np.float64) / (w * x**2).sum(dtype=np.float64)))


def _record(library: str) -> dict[str, float]:
    class Memory(ctypes.Structure):
        _fields_ = [("size", ctypes.c_size_t), ("buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)]

    ggml = ctypes.CDLL(library)
    ggml.ggml_init.argtypes = [Memory]
    ggml.ggml_init(Memory(1 << 20, None, False))  # initializes its float16 tables
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    ggml.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, number, number, number, pointer]
    x, importance = matrix()
    errors = {}
    for kind, has in cases():
        out = np.zeros((ROWS, kind.info.row_bytes(COLS)), np.uint8)
        at = importance.ctypes.data if has else None
        ggml.ggml_quantize_chunk(int(kind), x.ctypes.data, out.ctypes.data, 0, ROWS, COLS, at)
        errors[kind.name + "+" * has] = round(relative_error(kind, out.tobytes(), x, importance if has else None), 6)
    return errors


if __name__ == "__main__":
    print(json.dumps(_record(sys.argv[1]), indent=0))

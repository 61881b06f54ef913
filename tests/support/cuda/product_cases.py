"""Random matrix products on a GPU."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from llamaclust.kernels import _native
from llamaclust.kernels.cuda.launches.gpu_properties import LaunchLimits
from llamaclust.kernels.cuda.launches.inputs import RowCount
from llamaclust.kernels.cuda.launches.matmul import (
    Product,
    Weights,
    activation_bytes,
    multiply,
    quantize,
)
from llamaclust.kernels.cuda.runtime.device import NULL, Buffer
from llamaclust.model.quant_types import ActivationFormat, QuantType
from support.arithmetic.matmul_cases import FLOAT_TYPES
from support.cuda.launching import Bench

Float32 = NDArray[np.float32]


LEVEL = _native.available_levels()[-1]


def generator_of(*what: object) -> np.random.Generator:
    seed = zlib.crc32(repr(what).encode())
    print("seed", seed)
    return np.random.default_rng(seed)


@dataclass(frozen=True)
class Loaded:
    """The same tiles on the CPU and on the device."""

    on_cpu: _native.PackedMatrix
    memory: _native.Memory
    weights: Weights


def load(bench: Bench, kind: QuantType, data: bytes, rows: int, cols: int) -> Loaded:
    n_bytes = _native.PackedMatrix.shape_only(kind, rows, cols).bytes
    memory = _native.Memory(n_bytes)
    matrix = _native.PackedMatrix(kind, rows, cols, memory, 0)
    matrix.pack_rows(0, data)
    return Loaded(matrix, memory, Weights(kind, (rows, cols), bench.put(memory.view).at()))


def segment_cols(kind: QuantType) -> int:
    return 16 if kind in FLOAT_TYPES else kind.info.block_size


def limits_of(bench: Bench, sms: int) -> LaunchLimits:
    """Returns the limits of the bench's device, as if it had `sms` multiprocessors."""
    return replace(LaunchLimits.of(bench.device), sms=sms)


def count_of(bench: Bench, rows: int) -> np.uint64:
    return bench.put(np.array([rows], np.int32)).at()


def quantized(bench: Bench, weights: Weights, x: Float32, bucket: int) -> np.uint64:
    """Returns the address of x as activations for products with `weights`, quantized if these need it."""
    values = bench.put(x)
    if weights.activation is ActivationFormat.F32:
        return values.at()
    out = bench.room(activation_bytes(weights.activation, bucket, weights.cols))
    rows = RowCount(bucket, count_of(bench, len(x)))
    bench.device.launch(quantize(weights.activation, values.at(), weights.cols, rows, out.at()))
    return out.at()


def products(
    bench: Bench, weights: Weights, x: Float32, bias: Buffer | None = None, sms: int = 4, bucket: int | None = None
) -> Float32:
    """Returns products [rows of x, rows of weights], launched for `bucket` rows."""
    bucket = bucket or len(x)
    out = bench.put(np.full((bucket, weights.rows), np.float32(7)))
    activations, address = quantized(bench, weights, x, bucket), NULL if bias is None else bias.at()
    rows = RowCount(bucket, count_of(bench, len(x)))
    bench.device.launch(multiply([Product(weights, address, out.at())], activations, rows, limits_of(bench, sms)))
    got: Float32 = bench.get(out, (bucket, weights.rows))
    assert (got[len(x) :] == 7).all()
    return got[: len(x)]


def none_numbers(x: Float32, width: int) -> None:
    """Writes zeros, infinity, NaN, huge and tiny numbers, and ties of rounding into some rows of x."""
    x[0, :width] = 0
    for row, value in ((1, np.inf), (2, np.nan), (4, np.float32(3e38)), (5, np.float32(-1e-40))):
        if row < len(x):
            x[row, -1] = value
    if len(x) > 7:
        x[6] = np.float32(2.0**-118) * (x[6] / np.abs(x[6]).max())
        x[7] = np.round(x[7] * 20) + np.float32(0.5)
        x[7, ::width] = 127

"""Learned positions of patches, interpolated to a tile's size. All operations are single IEEE 754 operations in a fixed
order, so results have the same bits on all machines."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from llamaclust.core.errors import ModelFileError
from llamaclust.model.architectures.vision.family import Positions
from llamaclust.model.gguf.tensors import Tensor
from llamaclust.model.quant_types import QuantType

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Taps = Sequence[tuple[int, float]]
"""The rows (or columns) of the table that make one row (or column) of the result, with their weights."""

_CUBIC = -0.75
_ROWS_AT_ONCE = 64
_Q8_0_WEIGHTS = 32
_READ = (QuantType.F32, QuantType.F16, QuantType.BF16, QuantType.Q8_0)


def check_readable(tensor: Tensor) -> None:
    if tensor.quant_type not in _READ:
        known = ", ".join(kind.name for kind in _READ)
        what = f"type {tensor.quant_type.name} is not supported; supported: {known}"
        raise ModelFileError(f"{tensor.path}: tensor {tensor.name}: {what}; use another mmproj file")


def read_floats(tensor: Tensor) -> Float32:
    """Returns a tensor's values as float32, in the tensor's shape. `check_readable` must have accepted the tensor."""
    data, shape = tensor.read(), tensor.shape
    match tensor.quant_type:
        case QuantType.F32:
            return np.frombuffer(data, "<f4").reshape(shape)
        case QuantType.F16:
            return np.frombuffer(data, "<f2").astype(np.float32).reshape(shape)
        case QuantType.BF16:
            return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32).reshape(shape)
        case QuantType.Q8_0:
            blocks = np.frombuffer(data, [("scale", "<f2"), ("quants", "i1", (_Q8_0_WEIGHTS,))])
            scaled = blocks["quants"].astype(np.float32) * blocks["scale"].astype(np.float32)[:, None]
            return scaled.reshape(shape)
    raise AssertionError("check_readable refuses other types")


def interpolated(table: Float32, height: int, width: int, rule: Positions) -> Float32:
    """Interpolates a square table [side * side, channels] to [height * width, channels]. Weights, products and sums are
    float64, and the result is rounded once. Rows are added before columns, both in ascending order."""
    side = math.isqrt(len(table))
    if rule is Positions.TABLE or height == width == side:
        assert len(table) == height * width, (len(table), height, width)
        return table
    grid = table.reshape(side, side, -1).astype(np.float64)
    taps = _RULES[rule]
    of_rows, of_columns = taps(side, height), taps(side, width)
    out = np.empty((height, width, table.shape[1]), np.float32)
    for start in range(0, height, _ROWS_AT_ONCE):
        rows = np.stack([_weighted(grid, read) for read in of_rows[start : start + _ROWS_AT_ONCE]], axis=1)
        for column, read in enumerate(of_columns):
            out[start : start + _ROWS_AT_ONCE, column] = _weighted(rows, read)
    return out.reshape(height * width, -1)


def interpolation_bytes(side: int, channels: int) -> int:
    return 8 * channels * (side * side + 2 * _ROWS_AT_ONCE * side + 2 * _ROWS_AT_ONCE)


def of_axes(table: Float32, height: int, width: int) -> Float32:
    """Returns table[0, column] + table[1, row] for each patch: [height * width, channels] from [2, size, channels]."""
    columns, rows = table
    added: Float32 = columns[None, :width] + rows[:height, None]
    return added.reshape(height * width, -1)


def _weighted(grid: Float64, read: Taps) -> Float64:
    out = np.zeros(grid.shape[1:])
    for index, weight in read:
        out += grid[index] * weight
    return out


def _corner_taps(side: int, size: int) -> list[Taps]:
    """Returns weights that resize `side` values to `size` (bilinear, aligned corners). Keeps the end values."""
    return [_linear(number * (side - 1) / (size - 1) if size > 1 else 0.0, side) for number in range(size)]


def _linear(place: float, side: int) -> Taps:
    first = min(math.floor(place), side - 1)
    share = place - first
    return (first, 1.0 - share), (min(first + 1, side - 1), share)


def _cubic_taps(side: int, size: int) -> list[Taps]:
    """Returns weights that resize `side` values to `size` (bicubic, half-pixel centers). Repeats edge values."""
    return [_cubic((number + 0.5) * side / size - 0.5, side) for number in range(size)]


def _cubic(place: float, side: int) -> Taps:
    first = math.floor(place)
    share = place - first
    distances = 1.0 + share, share, 1.0 - share, 2.0 - share
    indexes = (min(max(first + offset, 0), side - 1) for offset in range(-1, 3))
    return tuple(zip(indexes, (_cubic_weight(distance) for distance in distances), strict=True))


def _cubic_weight(x: float) -> float:
    if x <= 1.0:
        return ((_CUBIC + 2.0) * x - (_CUBIC + 3.0)) * x * x + 1.0
    return ((x - 5.0) * x + 8.0) * x * _CUBIC - 4.0 * _CUBIC


def _antialiased_taps(side: int, size: int) -> list[Taps]:
    """Returns weights that resize `side` values to `size` (antialiased bilinear, half-pixel centers) and sum to 1."""
    return [_antialiased((number + 0.5) * side / size - 0.5, side, max(side / size, 1.0)) for number in range(size)]


def _antialiased(place: float, side: int, support: float) -> Taps:
    weights = [max(0.0, 1.0 - abs(index - place) / support) for index in range(side)]
    total = 0.0
    for weight in weights:  # The function `sum` rounds differently since Python 3.12.
        total += weight
    return tuple((index, weight / total) for index, weight in enumerate(weights) if weight > 0)


_RULES: dict[Positions, Callable[[int, int], Sequence[Taps]]] = {
    Positions.BILINEAR_CORNERS: _corner_taps,
    Positions.ANTIALIASED: _antialiased_taps,
    Positions.BICUBIC: _cubic_taps,
}

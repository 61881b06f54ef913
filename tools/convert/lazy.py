"""Lazy tensors. A lazy tensor has a shape, a storage type, and a function that reads and transforms rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod
from threading import RLock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llamaclust.core.errors import ModelFileError
from llamaclust.model.checkpoints.storage import Storage
from llamaclust.model.quant_types import QuantType

Array = NDArray[Any]
Rows = Callable[[int, int], Array]

_MAX_LOGARITHM = 88.0
_WASTE = 4
"""`gathered` reads a contiguous range if the range has at most this many rows per wanted row."""


@dataclass(frozen=True, slots=True)
class Lazy:
    """A tensor that is read on demand. Any thread can call `read(start, end)`, which returns the rows [start, end).
    If `packed` is not None, rows consist of blocks of this quant type. `origin` names the tensor in errors."""

    shape: tuple[int, ...]
    storage: Storage
    read: Rows
    origin: str
    packed: QuantType | None = None

    @property
    def row_elements(self) -> int:
        return prod(self.shape[1:])

    @property
    def n_bytes(self) -> int:
        return prod(self.shape) * self.storage.dtype.itemsize

    def all(self) -> Array:
        return self.read(0, self.shape[0])

    def floats(self) -> NDArray[np.float32]:
        return as_floats(self.all(), self.storage)


def as_floats(values: Array, storage: Storage) -> NDArray[np.float32]:
    if storage is Storage.BF16:
        return np.left_shift(values, 16, dtype=np.uint32).view(np.float32)
    return values.astype(np.float32, copy=False)


def constant(values: NDArray[np.float32], origin: str) -> Lazy:
    return Lazy(values.shape, Storage.F32, lambda start, end: values[start:end], origin)


def rows(tensor: Lazy, start: int, end: int) -> Lazy:
    shape = (end - start, *tensor.shape[1:])
    return replace(tensor, shape=shape, read=lambda first, last: tensor.read(start + first, start + last))


def gathered(tensor: Lazy, index: NDArray[np.int64]) -> Lazy:

    def read(start: int, end: int) -> Array:
        wanted = index[start:end]
        if not len(wanted):
            return tensor.read(0, 0)
        low, high = int(wanted.min()), int(wanted.max()) + 1
        if high - low <= _WASTE * len(wanted):
            return tensor.read(low, high)[wanted - low]
        cuts = np.flatnonzero(np.diff(wanted) != 1) + 1
        return np.concatenate([tensor.read(int(run[0]), int(run[-1]) + 1) for run in np.split(wanted, cuts)])

    return replace(tensor, shape=(len(index), *tensor.shape[1:]), read=read)


def stacked(tensors: Sequence[Lazy]) -> Lazy:
    tensors = _alike(tensors)
    first = tensors[0]

    def read(start: int, end: int) -> Array:
        return np.stack([tensor.all() for tensor in tensors[start:end]])

    return replace(first, shape=(len(tensors), *first.shape), read=read)


def below(tensors: Sequence[Lazy]) -> Lazy:
    tensors = _alike(tensors)
    first = tensors[0]
    ends = np.cumsum([tensor.shape[0] for tensor in tensors]).tolist()

    def read(start: int, end: int) -> Array:
        parts = []
        for tensor, last in zip(tensors, ends, strict=True):
            begin = last - tensor.shape[0]
            low, high = max(start, begin), min(end, last)
            if low < high:
                parts.append(tensor.read(low - begin, high - begin))
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    return replace(first, shape=(ends[-1], *first.shape[1:]), read=read)


def beside(tensors: Sequence[Lazy]) -> Lazy:
    tensors = _alike(tensors)
    first = tensors[0]
    width = sum(tensor.shape[1] for tensor in tensors)

    def read(start: int, end: int) -> Array:
        return np.concatenate([tensor.read(start, end) for tensor in tensors], axis=1)

    return replace(first, shape=(first.shape[0], width), read=read)


def mapped(tensor: Lazy, change: Callable[[NDArray[np.float32]], NDArray[np.float32]]) -> Lazy:
    """Applies `change` to rows in float32. `change` must keep the shape."""

    def read(start: int, end: int) -> Array:
        return change(as_floats(tensor.read(start, end), tensor.storage))

    return replace(tensor, storage=Storage.F32, read=read)


def decay(logarithms: Lazy) -> Lazy:
    """Computes -exp(logarithm) in float32. Raises ModelFileError for a logarithm that is too large."""

    def change(values: NDArray[np.float32]) -> NDArray[np.float32]:
        if (values > _MAX_LOGARITHM).any():
            what = f"the logarithm of a decay is {np.nanmax(values):g}"
            raise ModelFileError(f"{logarithms.origin}: {what}; the limit is {_MAX_LOGARITHM:g}")
        return -np.exp(values)

    return mapped(logarithms, change)


def scaled(tensor: Lazy, factors: NDArray[np.float32]) -> Lazy:
    """Multiplies row i by factors[i], in float32. Raises ModelFileError on overflow."""
    by_row = factors.reshape(-1, *[1] * (len(tensor.shape) - 1))

    def read(start: int, end: int) -> Array:
        values, factors = as_floats(tensor.read(start, end), tensor.storage), by_row[start:end]
        try:
            with np.errstate(over="raise", invalid="ignore"):  # Infinity is checked when the output type is known.
                return values * factors
        except FloatingPointError:
            what = f"weights of up to {np.nanmax(np.abs(values)):g} times {factors.max():g} do not fit float32"
            raise ModelFileError(f"{tensor.origin}: {what}") from None

    return replace(tensor, storage=Storage.F32, read=read)


def squeezed(tensor: Lazy) -> Lazy:
    """Converts a matrix with one row or one column to a vector."""
    return replace(
        tensor, shape=(prod(tensor.shape),), read=lambda start, end: tensor.all().reshape(-1)[start:end].copy()
    )


def joined(tensor: Lazy) -> Lazy:
    width = tensor.row_elements
    return replace(
        tensor,
        shape=(tensor.shape[0], width),
        read=lambda first, last: tensor.read(first, last).reshape(last - first, width),
    )


def reshaped(tensor: Lazy, shape: tuple[int, ...]) -> Lazy:
    """Reshapes a tensor. Each read, even of a few rows, reads the whole tensor."""
    return replace(tensor, shape=shape, read=lambda first, last: tensor.all().reshape(shape)[first:last])


def in_groups(tensor: Lazy, size: int) -> Lazy:
    shape = (tensor.shape[0] // size, size, *tensor.shape[1:])
    return replace(
        tensor,
        shape=shape,
        read=lambda first, last: tensor.read(first * size, last * size).reshape(last - first, *shape[1:]),
    )


def columns_of(tensor: Lazy, index: NDArray[np.int64]) -> Lazy:
    shape = (tensor.shape[0], len(index))
    return replace(tensor, shape=shape, read=lambda first, last: tensor.read(first, last)[:, index])


def part_of_each(tensor: Lazy, start: int, end: int) -> Lazy:
    shape = (tensor.shape[0], end - start, *tensor.shape[2:])
    return replace(tensor, shape=shape, read=lambda first, last: tensor.read(first, last)[:, start:end])


def strided(tensor: Lazy, axis: int, start: int, step: int) -> Lazy:
    """Takes the positions `start`, `start + step`, ... along `axis`, which must not be 0."""
    index = (*[slice(None)] * axis, slice(start, None, step))
    size = len(range(start, tensor.shape[axis], step))
    shape = (*tensor.shape[:axis], size, *tensor.shape[axis + 1 :])
    return replace(tensor, shape=shape, read=lambda first, last: tensor.read(first, last)[index])


def exchanged(tensor: Lazy) -> Lazy:
    """Transposes [n, columns, rows] to [n, rows, columns]."""
    count, columns, height = tensor.shape
    return replace(
        tensor, shape=(count, height, columns), read=lambda first, last: tensor.read(first, last).swapaxes(1, 2)
    )


def transposed(tensor: Lazy, recent: Recent) -> Lazy:
    """Transposes a matrix. The whole matrix is read at once and kept in `recent`."""

    def read(start: int, end: int) -> Array:
        whole = recent.get(tensor, tensor.all)
        return np.ascontiguousarray(whole[:, start:end].T)

    return replace(tensor, shape=tensor.shape[::-1], read=read)


def _alike(tensors: Sequence[Lazy]) -> Sequence[Lazy]:
    if len({tensor.storage for tensor in tensors}) == 1:
        return tensors
    return [mapped(tensor, lambda values: values) for tensor in tensors]


class Recent:
    """A thread-safe cache of the last two results, for threads that need different parts of the same result."""

    def __init__(self) -> None:
        self._lock = RLock()  # A result may be made of other results.
        self._kept: list[tuple[object, Any]] = []

    def get(self, key: object, make: Callable[[], Any]) -> Any:
        with self._lock:
            found = next((value for one, value in self._kept if one is key), None)
            if found is None:
                found = make()
                self._kept = [*self._kept[-1:], (key, found)]
            return found

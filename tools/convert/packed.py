"""Dequantizes 4-bit weights that GPTQ and AWQ pack eight to an int32, while they are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from llamaclust.core.errors import ModelFileError
from llamaclust.tools.convert.eight_bit import EIGHT_BIT_METHODS, with_floats
from llamaclust.tools.convert.lazy import Array, Lazy, Recent, Storage
from llamaclust.tools.convert.settings import Settings

_Steps = Callable[[NDArray[np.uint32], int, int], NDArray[np.uint8]]
_EIGHT: Final = 8
_SHIFTS: Final = np.arange(0, 32, 4, dtype=np.uint32)
_AWQ_ORDER: Final = np.array([0, 4, 1, 5, 2, 6, 3, 7])
"""The place of an output among the eight of a number."""


@dataclass(frozen=True, slots=True)
class _Matrix:
    """A packed matrix of `inputs` x `outputs`; `group` inputs share scale and zero, or `order` says which ones do."""

    weight: Lazy
    zeros: Lazy
    scales: Lazy
    order: Lazy | None
    inputs: int
    outputs: int
    group: int
    zero_offset: int


def unpacked(tensors: Mapping[str, Lazy], settings: Settings, recent: Recent) -> Mapping[str, Lazy]:
    """The same tensors, and a `.weight` for every `.qweight`; ModelFileError for a kind of packing not known."""
    if not settings.has("quantization_config"):
        return tensors
    said = settings.inner("quantization_config")
    method = said.text("quant_method", default="")
    if method in EIGHT_BIT_METHODS:
        return with_floats(tensors, said)
    if method not in ("gptq", "awq"):
        known = ", ".join(("gptq", "awq", *EIGHT_BIT_METHODS))
        raise said.error("quant_method", f"{method!r} is not supported, only {known}")
    if said.count("bits", "w_bit", default=4, maximum=32) != 4:
        raise said.error("bits", f"{said.values.get('bits')}, only 4 are supported")
    found = {name: tensor for name, tensor in tensors.items() if not _is_part(name, tensors)}
    for name in (name for name in tensors if name.endswith(".qweight")):
        stem = name.removesuffix(".qweight")
        found[f"{stem}.weight"] = (
            _gptq(stem, tensors, said, recent) if method == "gptq" else _awq(stem, tensors, recent)
        )
    return found


def _is_part(name: str, tensors: Mapping[str, Lazy]) -> bool:
    stem, _, part = name.rpartition(".")
    return part in ("qweight", "qzeros", "scales", "g_idx") and f"{stem}.qweight" in tensors


def _gptq(stem: str, tensors: Mapping[str, Lazy], said: Settings, recent: Recent) -> Lazy:
    """Inputs are packed in weights, outputs in zeros; zeros are one less than they are meant, but in version 2."""
    rows, outputs = _shape(tensors[f"{stem}.qweight"])
    offset = 0 if said.text("checkpoint_format", default="gptq") == "gptq_v2" else 1
    matrix = _matrix(stem, tensors, rows * _EIGHT, outputs, offset)
    return _lazy(matrix, recent, _gptq_steps)


def _awq(stem: str, tensors: Mapping[str, Lazy], recent: Recent) -> Lazy:
    """Outputs are packed in weights and zeros, in an order of their own."""
    inputs, columns = _shape(tensors[f"{stem}.qweight"])
    return _lazy(_matrix(stem, tensors, inputs, columns * _EIGHT, 0), recent, _awq_steps)


def _shape(weight: Lazy) -> tuple[int, int]:
    if len(weight.shape) != 2:
        raise ModelFileError(f"{weight.origin}: shape {list(weight.shape)}, a matrix expected")
    return weight.shape[0], weight.shape[1]


def _matrix(stem: str, tensors: Mapping[str, Lazy], inputs: int, outputs: int, offset: int) -> _Matrix:
    weight = tensors[f"{stem}.qweight"]
    missing = next((part for part in ("qzeros", "scales") if f"{stem}.{part}" not in tensors), None)
    if missing is not None:
        raise ModelFileError(f"{weight.origin}: {missing} beside it is missing")
    zeros, scales, order = tensors[f"{stem}.qzeros"], tensors[f"{stem}.scales"], tensors.get(f"{stem}.g_idx")
    groups = scales.shape[0]
    fits = scales.shape == (groups, outputs) and zeros.shape == (groups, outputs // _EIGHT) and inputs % groups == 0
    typed = weight.storage is zeros.storage is Storage.I32 and scales.storage.is_real
    if not fits or not typed or outputs % _EIGHT or (order is not None and order.shape != (inputs,)):
        shapes = f"{list(weight.shape)}, zeros {list(zeros.shape)}, scales {list(scales.shape)}"
        raise ModelFileError(f"{weight.origin}: shapes that do not fit together: {shapes}")
    return _Matrix(weight, zeros, scales, order, inputs, outputs, inputs // groups, offset)


@dataclass(frozen=True, slots=True)
class _Parts:
    """A packed matrix in memory: packed numbers, zeros and scales [groups, outputs], the group of each input."""

    packed: NDArray[np.uint32]
    zeros: NDArray[np.float32]
    scales: NDArray[np.float32]
    groups: NDArray[np.int64]


def _lazy(matrix: _Matrix, recent: Recent, steps: _Steps) -> Lazy:
    """[outputs, inputs], as checkpoints that are not packed have it."""

    def load() -> _Parts:
        packed = _nibbles(matrix.zeros.all())
        if steps is _awq_steps:
            packed = packed[..., _AWQ_ORDER]
        zeros = packed.reshape(len(packed), -1).astype(np.float32) + np.float32(matrix.zero_offset)
        return _Parts(matrix.weight.all().view(np.uint32), zeros, matrix.scales.floats(), _groups(matrix))

    def read(start: int, end: int) -> Array:
        parts: _Parts = recent.get(matrix, load)
        values = steps(parts.packed, start, end).astype(np.float32)
        values -= parts.zeros[parts.groups, start:end]
        values *= parts.scales[parts.groups, start:end]
        return np.ascontiguousarray(values.T)

    return Lazy((matrix.outputs, matrix.inputs), Storage.F32, read, matrix.weight.origin)


def _groups(matrix: _Matrix) -> NDArray[np.int64]:
    """The group of each input."""
    if matrix.order is None:
        return np.arange(matrix.inputs, dtype=np.int64) // matrix.group
    groups = matrix.order.all().astype(np.int64)
    if groups.min() < 0 or groups.max() >= matrix.scales.shape[0]:
        raise ModelFileError(f"{matrix.order.origin}: group {groups.max()} of {matrix.scales.shape[0]}")
    return groups


def _gptq_steps(packed: NDArray[np.uint32], start: int, end: int) -> NDArray[np.uint8]:
    """[inputs, end - start]"""
    return _nibbles(packed[:, start:end].T).reshape(end - start, -1).T


def _awq_steps(packed: NDArray[np.uint32], start: int, end: int) -> NDArray[np.uint8]:
    """[inputs, end - start]"""
    first = start // _EIGHT
    steps = _nibbles(packed[:, first : -(-end // _EIGHT)])[..., _AWQ_ORDER].reshape(len(packed), -1)
    return steps[:, start - first * _EIGHT : end - first * _EIGHT]


def _nibbles(packed: Array) -> NDArray[np.uint8]:
    """[..., n] of 32 bits as [..., n, 8] of four, the lowest first."""
    return ((packed.view(np.uint32)[..., None] >> _SHIFTS) & np.uint32(15)).astype(np.uint8)

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod

import numpy as np
from numpy.typing import NDArray

from llamaclust.core.errors import ModelFileError
from llamaclust.kernels._native import PackedMatrix, quant_types
from llamaclust.kernels.backend import Float32
from llamaclust.model.gguf.tensors import Tensor
from llamaclust.model.program import Program
from llamaclust.model.quant_types import QuantType

SUPPORTED_TYPES = tuple(map(QuantType, quant_types()))
_VECTOR_TYPES = (QuantType.F32, QuantType.F16, QuantType.BF16)


@dataclass(frozen=True, slots=True, weakref_slot=True, eq=False)
class Weight:
    """A float32 vector, a packed matrix, or one packed matrix per expert. If `is_shape_only`, it is not loaded."""

    quant_type: QuantType
    matrices: tuple[PackedMatrix, ...] = ()
    vector: Float32 = field(default_factory=lambda: np.empty(0, np.float32))
    is_shape_only: bool = False
    tiles: NDArray[np.uint8] = field(default_factory=lambda: np.empty(0, np.uint8))  # Tiles of all matrices, in order.

    @property
    def matrix(self) -> PackedMatrix:
        (matrix,) = self.matrices
        return matrix

    @property
    def n_bytes(self) -> int:
        return sum(matrix.bytes for matrix in self.matrices) + self.vector.nbytes


def shapes_only(program: Program, tensors: Mapping[str, Tensor]) -> dict[str, Weight]:
    check_weights(program, tensors)
    return {name: _shape_only(tensors[name]) for name in program.weights}


def _shape_only(tensor: Tensor) -> Weight:
    if len(tensor.shape) == 1:
        return Weight(tensor.quant_type, vector=np.zeros(tensor.shape, np.float32))
    *count, rows, cols = tensor.shape
    shape = PackedMatrix.shape_only(int(tensor.tile_type), rows, cols)
    return Weight(tensor.tile_type, (shape,) * prod(count), is_shape_only=True)


def check_weights(program: Program, tensors: Mapping[str, Tensor]) -> None:
    """Raises ModelFileError if a tensor has the wrong shape or a type without kernels. Reads no weights."""
    for step in program.steps:
        for weight in step.weights:
            _check(tensors[weight.name], weight.shape)


def _check(tensor: Tensor, wanted: tuple[int, ...]) -> None:
    allowed = _VECTOR_TYPES if len(wanted) == 1 else SUPPORTED_TYPES
    if tensor.quant_type not in allowed:
        known = ", ".join(kind.name for kind in allowed)
        what = f"type {tensor.quant_type.name} has no CPU kernels; supported: {known}"
        raise ModelFileError(f"{tensor.path}: tensor {tensor.name}: {what}; use another GGUF file of this model")
    fits = len(wanted) == len(tensor.shape) and all(map(_is_size, wanted, tensor.shape))
    if not fits or max(tensor.shape) >= 1 << 31:
        sizes = [size if size >= 0 else "any" for size in wanted]
        what = f"shape {list(tensor.shape)}, but the metadata requires {sizes}"
        raise ModelFileError(f"{tensor.path}: tensor {tensor.name}: {what}; the file is damaged")


def _is_size(wanted: int, found: int) -> bool:
    return wanted in (-1, found)

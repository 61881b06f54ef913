"""Weights of the CPU backend: read from the model file in pieces, packed into tiles, shared by stages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from math import prod
from threading import Lock
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray

from llamaclust.errors import ModelFileError
from llamaclust.kernels.backend import Float32, Progress
from llamaclust.kernels.cpu._native import PackedMatrix
from llamaclust.model.program import Embed, MatMul, Moe, Program, RmsNorm, Step
from llamaclust.model.quant_types import QuantType
from llamaclust.model.tensors import Tensor

_CHUNK_BYTES = 1 << 22
"""Read and packed at once: progress moves, and little memory is held twice."""

_TILE_ROWS = 16

SUPPORTED_TYPES = (
    QuantType.F32,
    QuantType.F16,
    QuantType.BF16,
    QuantType.Q4_0,
    QuantType.Q4_1,
    QuantType.Q5_0,
    QuantType.Q5_1,
    QuantType.Q8_0,
    QuantType.Q2_K,
    QuantType.Q3_K,
    QuantType.Q4_K,
    QuantType.Q5_K,
    QuantType.Q6_K,
    QuantType.IQ4_NL,
    QuantType.IQ4_XS,
    QuantType.MXFP4,
    QuantType.TQ2_0,
    QuantType.TQ1_0,
    QuantType.IQ2_XXS,
    QuantType.IQ2_XS,
    QuantType.IQ2_S,
    QuantType.IQ3_XXS,
    QuantType.IQ3_S,
    QuantType.IQ1_S,
    QuantType.IQ1_M,
)
_VECTOR_TYPES = (QuantType.F32, QuantType.F16, QuantType.BF16)


@dataclass(frozen=True, slots=True)
class Need:
    """What a program takes a tensor for; -1 stands for any number of rows."""

    shape: tuple[int, ...]

    @property
    def is_vector(self) -> bool:
        return len(self.shape) == 1

    def fits(self, shape: tuple[int, ...]) -> bool:
        return len(shape) == len(self.shape) and all(
            wanted in (-1, found) for wanted, found in zip(self.shape, shape, strict=True)
        )


def needs_of(program: Program) -> dict[str, list[Need]]:
    """For every tensor of the program, what its steps take it for."""
    needs: dict[str, list[Need]] = {}
    for step in program.steps:
        for name, shape in _shapes(step):
            needs.setdefault(name, []).append(Need(shape))
    return needs


def _shapes(step: Step) -> Iterator[tuple[str, tuple[int, ...]]]:
    match step:
        case Embed():
            yield step.weight, (-1, step.out.width)
        case RmsNorm():
            yield step.weight, (step.x.width,)
        case MatMul():
            yield step.weight, (step.out.width, step.x.width)
            if step.bias is not None:
                yield step.bias, (step.out.width,)
        case Moe():
            yield step.router, (step.experts, step.x.width)
            yield step.gate, (step.experts, step.ffn_width, step.x.width)
            yield step.up, (step.experts, step.ffn_width, step.x.width)
            yield step.down, (step.experts, step.out.width, step.ffn_width)


@dataclass(frozen=True, slots=True, weakref_slot=True, eq=False)
class Weight:
    """A loaded tensor: a vector of float32, or packed matrices (one, or one for each expert)."""

    quant_type: QuantType
    matrices: tuple[PackedMatrix, ...] = ()
    vector: Float32 = field(default_factory=lambda: np.empty(0, np.float32))

    @property
    def matrix(self) -> PackedMatrix:
        (matrix,) = self.matrices
        return matrix

    @property
    def n_bytes(self) -> int:
        return sum(matrix.bytes for matrix in self.matrices) + self.vector.nbytes


def shapes_only(program: Program, tensors: Mapping[str, Tensor]) -> dict[str, Weight]:
    """Stand-ins for the weights of a program, for planning. ModelFileError as for `check_weights`."""
    check_weights(program, tensors)
    return {name: _shape_only(tensors[name]) for name in program.weights}


def _shape_only(tensor: Tensor) -> Weight:
    if len(tensor.shape) == 1:
        return Weight(tensor.quant_type, vector=np.zeros(tensor.shape, np.float32))
    *count, rows, cols = tensor.shape
    shape = PackedMatrix.shape_only(int(tensor.quant_type), rows, cols)
    return Weight(tensor.quant_type, (shape,) * prod(count))


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Rows [start, end) of a tensor's matrix number `index`, or a whole vector."""

    tensor: Tensor
    weight: Weight
    index: int
    start: int
    end: int

    def load(self) -> int:
        """Reads and packs; returns the number of bytes."""
        row_bytes, rows = self.tensor.row_bytes, self.tensor.rows // max(len(self.weight.matrices), 1)
        data = np.empty((self.end - self.start) * row_bytes, np.uint8)
        self.tensor.read_into(data.data, (self.index * rows + self.start) * row_bytes)
        if self.weight.matrices:
            self.weight.matrices[self.index].pack_rows(self.start, data)
        else:
            self.weight.vector[:] = _to_float(self.tensor.quant_type, data)
        return data.nbytes


class WeightStore:
    """Loads tensors, each once for as long as any stage holds it."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._lock = Lock()
        self._loaded: WeakValueDictionary[tuple[object, ...], Weight] = WeakValueDictionary()

    def load(self, program: Program, tensors: Mapping[str, Tensor], progress: Progress) -> dict[str, Weight]:
        """ModelFileError for a tensor of the wrong shape or of a type without kernels, or a file that changed."""
        check_weights(program, tensors)
        needs = needs_of(program)
        with self._lock:
            weights = {name: self._loaded.get(_key(tensors[name])) for name in needs}
            present = {name: weight for name, weight in weights.items() if weight is not None}
            progress(sum(tensors[name].n_bytes for name in present))
            missing = self._read([tensors[name] for name in needs if name not in present], progress)
            self._loaded.update((_key(tensors[name]), weight) for name, weight in missing.items())
        return present | missing

    def _read(self, tensors: Sequence[Tensor], progress: Progress) -> dict[str, Weight]:
        weights = {tensor.name: _allocate(tensor) for tensor in tensors}
        chunks = [chunk for tensor in tensors for chunk in _chunks(tensor, weights[tensor.name])]
        with ThreadPoolExecutor(self._threads, "load-weights") as pool:
            for n_bytes in pool.map(_Chunk.load, chunks):
                progress(n_bytes)
        return weights


def _key(tensor: Tensor) -> tuple[object, ...]:
    return tensor.path, tensor.file_identity, tensor.name


def check_weights(program: Program, tensors: Mapping[str, Tensor]) -> None:
    """ModelFileError for a tensor of the wrong shape or of a type without kernels. Reads no weights."""
    for name, wanted in needs_of(program).items():
        for need in wanted:
            _check(tensors[name], need)


def _check(tensor: Tensor, need: Need) -> None:
    allowed = _VECTOR_TYPES if need.is_vector else SUPPORTED_TYPES
    if tensor.quant_type not in allowed:
        known = ", ".join(kind.name for kind in allowed)
        what = f"type {tensor.quant_type.name} cannot be computed with on cpu, only {known}"
        raise ModelFileError(f"{tensor.path}: tensor {tensor.name}: {what}; take another file of the model")
    if not need.fits(tensor.shape) or max(tensor.shape) >= 1 << 31:
        wanted = [size if size >= 0 else "any" for size in need.shape]
        what = f"shape {list(tensor.shape)}, the model's own figures ask for {wanted}"
        raise ModelFileError(f"{tensor.path}: tensor {tensor.name}: {what}; the file is damaged")


def _allocate(tensor: Tensor) -> Weight:
    if len(tensor.shape) == 1:
        return Weight(tensor.quant_type, vector=np.empty(tensor.shape, np.float32))
    *count, rows, cols = tensor.shape
    return Weight(
        tensor.quant_type, tuple(PackedMatrix(int(tensor.quant_type), rows, cols) for _ in range(prod(count)))
    )


def _chunks(tensor: Tensor, weight: Weight) -> Iterator[_Chunk]:
    if not weight.matrices:
        yield _Chunk(tensor, weight, 0, 0, 1)
        return
    rows = tensor.shape[-2]
    step = max(_CHUNK_BYTES // tensor.row_bytes // _TILE_ROWS, 1) * _TILE_ROWS
    for index in range(len(weight.matrices)):
        for start in range(0, rows, step):
            yield _Chunk(tensor, weight, index, start, min(start + step, rows))


def _to_float(kind: QuantType, data: NDArray[np.uint8]) -> Float32:
    match kind:
        case QuantType.F32:
            return data.view(np.float32)
        case QuantType.F16:
            return data.view(np.float16).astype(np.float32)
        case _:
            return (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)

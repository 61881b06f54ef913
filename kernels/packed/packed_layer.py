"""The tiles of a layer's matrices in one piece of memory: what lies where, how it gets there from the model file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod
from threading import local

import numpy as np
from numpy.typing import NDArray

from llamaclust.kernels._native import Memory, PackedMatrix
from llamaclust.kernels.backend import Float32
from llamaclust.kernels.packed.weights import Weight
from llamaclust.model.gguf.tensors import Tensor
from llamaclust.model.quant_types import TILE_ROWS, QuantType

_CHUNK_BYTES = 1 << 20
"""Read and packed at once: it stays in a core's cache, progress moves, and little memory is held twice."""


@dataclass(frozen=True, slots=True)
class PackedLayer:
    """The matrices of a layer, one after the other; or one matrix that is in no layer. No vectors."""

    name: str
    tensors: tuple[Tensor, ...]

    @property
    def n_bytes(self) -> int:
        return sum(tensor.resident_bytes for tensor in self.tensors)

    def weights(self, memory: Memory) -> dict[str, Weight]:
        """The matrices by tensor name, in memory that holds, or is to hold, this image."""
        weights, offset = {}, 0
        for tensor in self.tensors:
            *count, rows, cols = tensor.shape
            step = tensor.resident_bytes // prod(count)
            offsets = range(offset, offset + tensor.resident_bytes, step)
            kind = int(tensor.quant_type)
            weights[tensor.name] = Weight(
                tensor.quant_type, tuple(PackedMatrix(kind, rows, cols, memory, at) for at in offsets)
            )
            offset += tensor.resident_bytes
        return weights


def packed_layers_of(tensors: Iterable[Tensor]) -> list[PackedLayer]:
    """The images of all matrices among the tensors."""
    groups: dict[str, list[Tensor]] = {}
    for tensor in tensors:
        if len(tensor.shape) > 1:
            groups.setdefault(tensor.layer or tensor.name, []).append(tensor)
    return [PackedLayer(name, tuple(group)) for name, group in groups.items()]


@dataclass(frozen=True, slots=True)
class Chunk:
    """Rows [start, end) of matrix number `index` of a tensor, or a whole vector."""

    tensor: Tensor
    weight: Weight
    index: int
    start: int
    end: int

    @property
    def file_bytes(self) -> int:
        return (self.end - self.start) * self.tensor.row_bytes

    @property
    def resident_bytes(self) -> int:
        if not self.weight.matrices:
            return self.tensor.resident_bytes
        tiles = -(-(self.end - self.start) // TILE_ROWS)
        return tiles * self.tensor.quant_type.info.tile_bytes(self.tensor.shape[-1])

    def load(self, buffer: NDArray[np.uint8]) -> None:
        """Reads into the buffer, which has room for it, and packs from there. ModelFileError as of `Tensor.read`."""
        data = buffer[: self.file_bytes]
        rows = self.tensor.rows // max(len(self.weight.matrices), 1)
        self.tensor.read_into(data.data, (self.index * rows + self.start) * self.tensor.row_bytes)
        if self.weight.matrices:
            self.weight.matrices[self.index].pack_rows(self.start, data)
        else:
            self.weight.vector[:] = _to_float(self.tensor.quant_type, data)


def chunks_of(tensor: Tensor, weight: Weight) -> Iterator[Chunk]:
    """All of a tensor, in pieces."""
    if not weight.matrices:
        yield Chunk(tensor, weight, 0, 0, 1)
        return
    rows = tensor.shape[-2]
    step = max(_CHUNK_BYTES // tensor.row_bytes // TILE_ROWS, 1) * TILE_ROWS
    for index in range(len(weight.matrices)):
        for start in range(0, rows, step):
            yield Chunk(tensor, weight, index, start, min(start + step, rows))


class Buffers(local):
    """A buffer for each thread that asks, kept from one time to the next."""

    def __init__(self) -> None:
        self._buffer: NDArray[np.uint8] = np.empty(0, np.uint8)

    def get(self, n_bytes: int) -> NDArray[np.uint8]:
        if len(self._buffer) < n_bytes:
            self._buffer = np.empty(n_bytes, np.uint8)
        return self._buffer


def _to_float(kind: QuantType, data: NDArray[np.uint8]) -> Float32:
    match kind:
        case QuantType.F32:
            return data.view(np.float32)
        case QuantType.F16:
            return data.view(np.float16).astype(np.float32)
        case _:
            return (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)

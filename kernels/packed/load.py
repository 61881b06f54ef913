"""Loads tensors with several threads: packed layers from the cache, and other tensors in chunks from the model file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from threading import local

import numpy as np
from numpy.typing import NDArray

from llamaclust.kernels._native import Memory
from llamaclust.kernels.backend import Float32, Progress
from llamaclust.kernels.packed.cache import PackedCache
from llamaclust.kernels.packed.mapping import move_to_huge_pages
from llamaclust.kernels.packed.packed_layer import PackedLayer, packed_layers_of
from llamaclust.kernels.packed.weights import Weight
from llamaclust.model.gguf.tensors import Tensor
from llamaclust.model.quant_types import TILE_ROWS, QuantType

_CHUNK_BYTES = 1 << 20
"""The number of bytes that are read and packed at once. A chunk fits in a core's cache."""


@dataclass(frozen=True, slots=True)
class Loaded:
    weights: dict[str, Weight]
    cached: Mapping[PackedLayer, Memory]
    packed: Mapping[PackedLayer, Memory]  # Layers that this load packed.

    @property
    def contents(self) -> dict[str, NDArray[np.uint8]]:
        found = {name: weight.vector.view(np.uint8) for name, weight in self.weights.items()}
        for layer, memory in (*self.cached.items(), *self.packed.items()):
            for tensor, offset in layer.offsets:
                found[tensor.name] = memory.view[offset : offset + tensor.resident_bytes]
        return found


def load_tensors(
    tensors: Sequence[Tensor],
    cache: PackedCache | None,
    pool: Executor,
    progress: Progress | None,
    since_ns: int | None = None,
) -> Loaded:
    """Loads tensors. Passes the RAM size of each part to `progress`. Raises ModelFileError if the file has changed."""
    layers = packed_layers_of(tensors)
    cached = {} if cache is None else cache.open(layers, pool, progress, since_ns)
    packed = {layer: Memory(layer.n_bytes) for layer in layers if layer not in cached}
    weights = {
        tensor.name: Weight(tensor.quant_type, vector=np.empty(tensor.shape, np.float32))
        for tensor in tensors
        if len(tensor.shape) == 1
    }
    unread = [tensor for layer in packed for tensor in layer.tensors]
    unread += [tensor for tensor in tensors if tensor.name in weights]
    for layer, memory in (*cached.items(), *packed.items()):
        weights |= layer.weights(memory)
    buffers = _Buffers()

    def load(chunk: _Chunk) -> int:
        chunk.load(buffers.get(chunk.file_bytes))
        return chunk.resident_bytes

    for n_bytes in pool.map(load, [chunk for tensor in unread for chunk in _chunks_of(tensor, weights[tensor.name])]):
        if progress is not None:
            progress(n_bytes)
    move_to_huge_pages([memory for memory in (*cached.values(), *packed.values()) if memory.is_writable], pool)
    return Loaded(weights, cached, packed)


@dataclass(frozen=True, slots=True)
class _Chunk:
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
        return tiles * self.tensor.tile_type.info.tile_bytes(self.tensor.shape[-1])

    def load(self, buffer: NDArray[np.uint8]) -> None:
        data = buffer[: self.file_bytes]
        rows = self.tensor.rows // max(len(self.weight.matrices), 1)
        self.tensor.read_into(data.data, (self.index * rows + self.start) * self.tensor.row_bytes)
        if self.weight.matrices:
            self.weight.matrices[self.index].pack_rows(self.start, data, int(self.tensor.quant_type))
        else:
            self.weight.vector[:] = to_float(self.tensor.quant_type, data)


def _chunks_of(tensor: Tensor, weight: Weight) -> Iterator[_Chunk]:
    if not weight.matrices:
        yield _Chunk(tensor, weight, 0, 0, 1)
        return
    rows = tensor.shape[-2]
    step = max(_CHUNK_BYTES // tensor.row_bytes // TILE_ROWS, 1) * TILE_ROWS
    for index in range(len(weight.matrices)):
        for start in range(0, rows, step):
            yield _Chunk(tensor, weight, index, start, min(start + step, rows))


class _Buffers(local):
    def __init__(self) -> None:
        self._buffer: NDArray[np.uint8] = np.empty(0, np.uint8)

    def get(self, n_bytes: int) -> NDArray[np.uint8]:
        if len(self._buffer) < n_bytes:
            self._buffer = np.empty(n_bytes, np.uint8)
        return self._buffer


def to_float(kind: QuantType, data: NDArray[np.uint8]) -> Float32:
    match kind:
        case QuantType.F32:
            return data.view(np.float32)
        case QuantType.F16:
            return data.view(np.float16).astype(np.float32)
        case _:
            return (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)

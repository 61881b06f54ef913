"""Weights read from the model file, or taken from the packed layers on disk, and shared by stages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from weakref import WeakValueDictionary

import numpy as np

from llamaclust.kernels._native import Memory
from llamaclust.kernels.backend import Progress
from llamaclust.kernels.packed.cache import PackedCache
from llamaclust.kernels.packed.packed_layer import Buffers, Chunk, PackedLayer, chunks_of, packed_layers_of
from llamaclust.kernels.packed.weights import Weight, check_weights, needs_of
from llamaclust.model.gguf.tensors import Tensor
from llamaclust.model.program import Program


class WeightStore:
    """Loads tensors, each once for as long as any stage holds it."""

    def __init__(self, threads: int, packed_cache: PackedCache | None) -> None:
        self._threads = threads
        self._packed_cache = packed_cache
        self._lock = Lock()
        self._loaded: WeakValueDictionary[tuple[object, ...], Weight] = WeakValueDictionary()

    def load(self, program: Program, tensors: Mapping[str, Tensor], progress: Progress) -> dict[str, Weight]:
        """ModelFileError for a tensor of the wrong shape or of a type without kernels, or a file that changed."""
        check_weights(program, tensors)
        needs = needs_of(program)
        with self._lock:
            weights = {name: self._loaded.get(_key(tensors[name])) for name in needs}
            present = {name: weight for name, weight in weights.items() if weight is not None}
            progress(sum(tensors[name].resident_bytes for name in present))
            missing = self._load([tensors[name] for name in needs if name not in present], progress)
            self._loaded.update((_key(tensors[name]), weight) for name, weight in missing.items())
        return present | missing

    def held_bytes(self, tensors: Iterable[Tensor]) -> int:
        """Of those tensors that a stage holds now."""
        with self._lock:
            return sum(tensor.resident_bytes for tensor in tensors if _key(tensor) in self._loaded)

    def _load(self, tensors: Sequence[Tensor], progress: Progress) -> dict[str, Weight]:
        layers = packed_layers_of(tensors)
        with ThreadPoolExecutor(self._threads, "load-weights") as pool:
            found = {} if self._packed_cache is None else self._packed_cache.open(layers, pool, progress)
            made = {layer: Memory(layer.n_bytes) for layer in layers if layer not in found}
            weights = _weights(found) | _weights(made)
            vectors = {tensor.name: _vector(tensor) for tensor in tensors if len(tensor.shape) == 1}
            unread = [tensor for layer in made for tensor in layer.tensors]
            unread += [tensor for tensor in tensors if tensor.name in vectors]
            _read(unread, weights | vectors, pool, progress)
        if self._packed_cache is not None:
            self._packed_cache.keep(made)
        return weights | vectors


def _read(
    tensors: Sequence[Tensor], weights: Mapping[str, Weight], pool: ThreadPoolExecutor, progress: Progress
) -> None:
    buffers = Buffers()

    def load(chunk: Chunk) -> int:
        chunk.load(buffers.get(chunk.file_bytes))
        return chunk.resident_bytes

    for n_bytes in pool.map(load, [chunk for tensor in tensors for chunk in chunks_of(tensor, weights[tensor.name])]):
        progress(n_bytes)


def _weights(memories: Mapping[PackedLayer, Memory]) -> dict[str, Weight]:
    return {name: weight for layer, memory in memories.items() for name, weight in layer.weights(memory).items()}


def _vector(tensor: Tensor) -> Weight:
    return Weight(tensor.quant_type, vector=np.empty(tensor.shape, np.float32))


def _key(tensor: Tensor) -> tuple[object, ...]:
    return tensor.path, tensor.file_identity, tensor.name

"""Weights on a GPU: the CPU's packed tiles, uploaded layer by layer.

While a layer goes through two pinned buffers, the next one is packed; then its host memory is given back.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import cycle
from math import prod
from threading import Lock
from weakref import WeakValueDictionary, finalize

import numpy as np

from llamaclust.kernels._native import Memory
from llamaclust.kernels.backend import Progress
from llamaclust.kernels.cuda.runtime.device import Buffer, Bytes, Event
from llamaclust.kernels.cuda.runtime.gpu_lock import GpuLock
from llamaclust.kernels.cuda.runtime.memory import aligned, allocated
from llamaclust.kernels.packed.cache import PackedCache
from llamaclust.kernels.packed.cache_folder import PackedCacheFolder
from llamaclust.kernels.packed.packed_layer import Buffers, PackedLayer, chunks_of
from llamaclust.kernels.packed.weights import Weight, check_weights
from llamaclust.model.gguf.tensors import Tensor
from llamaclust.model.program import Program
from llamaclust.model.quant_types import QuantType

_STAGING_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class DeviceWeight:
    """A tensor on the device: a vector of float32, or matrices in tiles (one, or one for each expert), one behind the
    other."""

    quant_type: QuantType
    shape: tuple[int, ...]
    n_bytes: int
    address: np.uint64  # of its first byte; 0 in planning

    @classmethod
    def of(cls, tensor: Tensor, address: np.uint64 = np.uint64(0)) -> DeviceWeight:  # noqa: B008
        return cls(tensor.quant_type, tensor.shape, tensor.resident_bytes, address)

    @property
    def matrix_bytes(self) -> int:
        """From one expert's matrix to the next."""
        return self.n_bytes // prod(self.shape[:-2])


class LayerMemory:
    """GPU memory of a layer's weights, or of one weight outside layers. Freed with the last reference."""

    def __init__(self, layer: LayerTensors, buffer: Buffer) -> None:
        self.buffer = buffer
        self.weights = {tensor.name: DeviceWeight.of(tensor, buffer.at(offset)) for tensor, offset in layer.offsets}
        finalize(self, buffer.close)


@dataclass(frozen=True, slots=True)
class LayerTensors:
    """The tensors of one layer in the order of memory: matrices, then vectors; or one tensor that is in no layer."""

    packed: PackedLayer | None  # the matrices
    vectors: tuple[Tensor, ...]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (*(() if self.packed is None else self.packed.tensors), *self.vectors)

    @property
    def resident_bytes(self) -> int:
        return sum(tensor.resident_bytes for tensor in self.tensors)

    @property
    def offsets(self) -> Iterator[tuple[Tensor, int]]:
        """Where each begins. Matrices lie as in the packed layer: multiples of 16 bytes."""
        at = 0
        for tensor in self.tensors:
            yield tensor, at
            at = aligned(at + tensor.resident_bytes) if len(tensor.shape) == 1 else at + tensor.resident_bytes

    @property
    def n_bytes(self) -> int:
        tensor, at = list(self.offsets)[-1]
        return at + tensor.resident_bytes

    @property
    def key(self) -> tuple[object, ...]:
        return tuple((tensor.path, tensor.file_identity, tensor.name) for tensor in self.tensors)


def layers_of_weights(tensors: Iterable[Tensor]) -> list[LayerTensors]:
    """All tensors, those of a layer together."""
    groups: dict[str, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.layer or tensor.name, []).append(tensor)
    layers = []
    for name, group in groups.items():
        matrices = tuple(tensor for tensor in group if len(tensor.shape) > 1)
        vectors = tuple(tensor for tensor in group if len(tensor.shape) == 1)
        layers.append(LayerTensors(PackedLayer(name, matrices) if matrices else None, vectors))
    return layers


class DeviceWeights:
    """Loads layers and shares them between stages."""

    def __init__(self, gpu_lock: GpuLock, threads: int, packed_cache: PackedCacheFolder | None) -> None:
        """Stages may compute while others load."""
        self._gpu_lock = gpu_lock
        self._threads = threads
        self._packed_cache = None if packed_cache is None else PackedCache(packed_cache)
        self._lock = Lock()
        self._loaded: WeakValueDictionary[tuple[object, ...], LayerMemory] = WeakValueDictionary()

    def load(self, program: Program, tensors: Mapping[str, Tensor], progress: Progress) -> tuple[LayerMemory, ...]:
        """The memory of the program's weights. Errors as of the CPU's `WeightStore.load`; InsufficientMemoryError where
        the device has too little memory."""
        check_weights(program, tensors)
        layers = layers_of_weights(tensors[name] for name in program.weights)
        with self._lock:
            held = {layer: memory for layer in layers if (memory := self._loaded.get(layer.key)) is not None}
            progress(sum(layer.resident_bytes for layer in held))
            made = self._load([layer for layer in layers if layer not in held], progress)
            self._loaded.update((layer.key, memory) for layer, memory in made.items())
        return (*held.values(), *made.values())

    def held_bytes(self, tensors: Iterable[Tensor]) -> int:
        """Bytes of those tensors whose layers a stage holds now."""
        with self._lock:
            layers = layers_of_weights(tensors)
            return sum(layer.resident_bytes for layer in layers if layer.key in self._loaded)

    def _load(self, layers: Sequence[LayerTensors], progress: Progress) -> dict[LayerTensors, LayerMemory]:
        made: dict[LayerTensors, LayerMemory] = {}
        if not layers:
            return made
        since_ns = time.time_ns()
        uploads = _Uploads(self._gpu_lock)
        with ThreadPoolExecutor(self._threads, "load-weights") as pool, ThreadPoolExecutor(1, "next-layer") as ahead:
            coming = ahead.submit(self._packed, layers[0], pool, since_ns)
            for index, layer in enumerate(layers):
                host = coming.result()
                if index + 1 < len(layers):
                    coming = ahead.submit(self._packed, layers[index + 1], pool, since_ns)
                with self._gpu_lock.exclusive():
                    made[layer] = LayerMemory(layer, self._gpu_lock.device.allocate(allocated(layer.n_bytes)))
                for (tensor, offset), data in zip(layer.offsets, host.pieces(layer), strict=True):
                    uploads.bring(made[layer].buffer, offset, data)
                    progress(tensor.resident_bytes)
                self._cache(host, layer)
        uploads.wait()
        return made

    def _packed(self, layer: LayerTensors, pool: ThreadPoolExecutor, since_ns: int) -> _HostLayer:
        packed = layer.packed
        memory: Memory | None = None
        if packed is not None and self._packed_cache is not None:
            memory = self._packed_cache.open([packed], pool, None, since_ns).get(packed)
        is_new = packed is not None and memory is None
        if packed is not None and memory is None:
            memory = Memory(packed.n_bytes)
        weights = {} if packed is None or memory is None else packed.weights(memory)
        unread = layer.vectors if not is_new else layer.tensors
        weights |= {one.name: Weight(one.quant_type, vector=np.empty(one.shape, np.float32)) for one in layer.vectors}
        buffers = Buffers()
        chunks = [chunk for tensor in unread for chunk in chunks_of(tensor, weights[tensor.name])]
        for _ in pool.map(lambda chunk: chunk.load(buffers.get(chunk.file_bytes)), chunks):
            pass
        return _HostLayer(memory, is_new, {one.name: weights[one.name].vector for one in layer.vectors})

    def _cache(self, host: _HostLayer, layer: LayerTensors) -> None:
        """Writes a new layer to the packed-weight cache before its memory is freed."""
        if self._packed_cache is not None and host.is_new and layer.packed is not None and host.memory is not None:
            self._packed_cache.keep({layer.packed: host.memory})
            self._packed_cache.wait()


@dataclass(frozen=True, slots=True)
class _HostLayer:
    memory: Memory | None  # of the packed layer
    is_new: bool  # it was packed now
    vectors: Mapping[str, np.ndarray[tuple[int, ...], np.dtype[np.float32]]]

    def pieces(self, layer: LayerTensors) -> Iterator[Bytes]:
        """The bytes of its tensors, in their order."""
        at = 0
        for tensor in layer.tensors:
            if len(tensor.shape) == 1:
                yield self.vectors[tensor.name].view(np.uint8)
                continue
            assert self.memory is not None
            yield self.memory.view[at : at + tensor.resident_bytes]
            at += tensor.resident_bytes


class _Uploads:
    """Uploads through two pinned buffers: one is filled while the device copies from the other."""

    def __init__(self, gpu_lock: GpuLock) -> None:
        self._gpu_lock = gpu_lock
        self._free: list[Event | None] = [None, None]
        with gpu_lock.driver_errors():
            self._staging = [gpu_lock.device.pinned(_STAGING_BYTES) for _ in self._free]
        self._numbers = cycle(range(len(self._free)))

    def bring(self, buffer: Buffer, offset: int, data: Bytes) -> None:
        for start in range(0, len(data), _STAGING_BYTES):
            part, turn = data[start : start + _STAGING_BYTES], next(self._numbers)
            self._wait(turn)
            staged = self._staging[turn][: len(part)]
            np.copyto(staged, part)
            with self._gpu_lock.exclusive():
                self._gpu_lock.device.copy_in(buffer, offset + start, staged)
                self._free[turn] = self._gpu_lock.device.event()

    def wait(self) -> None:
        """Returns when all uploads are complete."""
        for turn in range(len(self._free)):
            self._wait(turn)

    def _wait(self, turn: int) -> None:
        event = self._free[turn]
        if event is not None:
            with self._gpu_lock.driver_errors():
                event.wait()

"""Weights on a GPU, in the same packed tiles as on the CPU. A layer is uploaded while the next layer is packed."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import cycle
from threading import Lock
from weakref import WeakValueDictionary, finalize

import numpy as np

from llamaclust.kernels.backend import Progress
from llamaclust.kernels.cuda.launches.matmul import Weights
from llamaclust.kernels.cuda.runtime.device import Buffer, Bytes, Event
from llamaclust.kernels.cuda.runtime.gpu_lock import GpuLock
from llamaclust.kernels.cuda.runtime.memory import aligned, allocated
from llamaclust.kernels.packed.cache import PackedCache
from llamaclust.kernels.packed.cache_folder import PackedCacheFolder
from llamaclust.kernels.packed.load import load_tensors
from llamaclust.kernels.packed.packed_layer import by_layer
from llamaclust.kernels.packed.weights import check_weights
from llamaclust.model.gguf.tensors import Tensor
from llamaclust.model.program import Program

_STAGING_BYTES = 16 << 20
_KERNELS_SHARE = 10


class LayerMemory:
    def __init__(self, layer: LayerTensors, buffer: Buffer) -> None:
        self.buffer = buffer
        self.weights = {
            tensor.name: Weights(tensor.quant_type, tensor.shape, buffer.at(offset)) for tensor, offset in layer.offsets
        }
        finalize(self, buffer.close)


@dataclass(frozen=True, slots=True)
class LayerTensors:
    """One layer's tensors in memory order (matrices before vectors), or one tensor outside the layers."""

    tensors: tuple[Tensor, ...]

    @property
    def resident_bytes(self) -> int:
        return sum(tensor.resident_bytes for tensor in self.tensors)

    @property
    def offsets(self) -> Iterator[tuple[Tensor, int]]:
        """Yields tensors and their offsets, multiples of 16 bytes. Matrices have the same offsets in `PackedLayer`."""
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
        return tuple((*tensor.source, tensor.name) for tensor in self.tensors)


def layers_of_weights(tensors: Iterable[Tensor]) -> list[LayerTensors]:
    groups = by_layer(tensors).values()
    return [LayerTensors(tuple(sorted(group, key=lambda tensor: len(tensor.shape) == 1))) for group in groups]


class DeviceWeights:
    def __init__(self, gpu_lock: GpuLock, threads: int, packed_cache: PackedCacheFolder | None) -> None:
        self._gpu_lock = gpu_lock
        self._threads = threads
        self._packed_cache = None if packed_cache is None else PackedCache(packed_cache)
        self._lock = Lock()
        self._loaded: WeakValueDictionary[tuple[object, ...], LayerMemory] = WeakValueDictionary()

    def load(self, program: Program, tensors: Mapping[str, Tensor], progress: Progress) -> tuple[LayerMemory, ...]:
        """Uploads packed weights. Raises InsufficientMemoryError, and the errors of the CPU's `WeightStore.load`."""
        check_weights(program, tensors)
        layers = layers_of_weights(tensors[name] for name in program.weights)
        with self._lock:
            held = {layer: memory for layer in layers if (memory := self._loaded.get(layer.key)) is not None}
            progress(sum(layer.resident_bytes for layer in held))
            made = self._load([layer for layer in layers if layer not in held], progress)
            self._loaded.update((layer.key, memory) for layer, memory in made.items())
        return (*held.values(), *made.values())

    def held_bytes(self, tensors: Iterable[Tensor]) -> int:
        with self._lock:
            layers = layers_of_weights(tensors)
            return sum(layer.resident_bytes for layer in layers if layer.key in self._loaded)

    def _load(self, layers: Sequence[LayerTensors], progress: Progress) -> dict[LayerTensors, LayerMemory]:
        made: dict[LayerTensors, LayerMemory] = {}
        if not layers:
            return made
        cache, since_ns, uploads = self._packed_cache, time.time_ns(), _Uploads(self._gpu_lock)
        with ThreadPoolExecutor(self._threads, "load-weights") as pool, ThreadPoolExecutor(1, "next-layer") as ahead:
            coming = ahead.submit(load_tensors, layers[0].tensors, cache, pool, None, since_ns)
            for index, layer in enumerate(layers):
                host = coming.result()
                if index + 1 < len(layers):
                    coming = ahead.submit(load_tensors, layers[index + 1].tensors, cache, pool, None, since_ns)
                with self._gpu_lock.exclusive():
                    made[layer] = LayerMemory(layer, self._gpu_lock.device.allocate(allocated(layer.n_bytes)))
                contents = host.contents
                for tensor, offset in layer.offsets:
                    uploads.bring(made[layer].buffer, offset, contents[tensor.name])
                    progress(tensor.resident_bytes)
                if cache is not None:
                    cache.keep(host.packed)
                    cache.wait()  # The cache must finish before the layer's host memory is freed.
                del host, contents
        uploads.wait()
        return made


class _Uploads:
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
        for turn in range(len(self._free)):
            self._wait(turn)

    def _wait(self, turn: int) -> None:
        event = self._free[turn]
        if event is not None:
            with self._gpu_lock.driver_errors():
                event.synchronize()


class LoadProgress:
    """Reports loaded bytes. Withholds up to 1 / `_KERNELS_SHARE` of them until kernels are compiled. Thread-safe."""

    def __init__(self, progress: Progress, total_bytes: int, modules: int) -> None:
        self._progress = progress
        self._total_bytes = total_bytes
        self._modules = self._modules_left = modules
        self._uploaded_bytes = self._reported_bytes = 0
        self._lock = Lock()

    def add_bytes(self, n_bytes: int) -> None:
        with self._lock:
            self._uploaded_bytes += n_bytes
            self._report()

    def module_done(self) -> None:
        with self._lock:
            self._modules_left -= 1
            self._report()

    def _report(self) -> None:
        withheld = self._total_bytes * self._modules_left // (_KERNELS_SHARE * max(1, self._modules))
        known = min(self._uploaded_bytes, self._total_bytes - withheld)
        if known > self._reported_bytes:
            more, self._reported_bytes = known - self._reported_bytes, known
            self._progress(more)

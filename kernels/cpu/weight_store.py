"""Loads weights from the model file or the packed-weight cache, and shares the weights between stages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from weakref import WeakValueDictionary

from llamaclust.kernels.backend import Progress
from llamaclust.kernels.packed.cache import PackedCache
from llamaclust.kernels.packed.load import load_tensors
from llamaclust.kernels.packed.locking import lock_memory
from llamaclust.kernels.packed.weights import Weight, check_weights
from llamaclust.model.gguf.tensors import Tensor
from llamaclust.model.program import Program


class WeightStore:
    def __init__(self, threads: int, packed_cache: PackedCache | None, *, mlock: bool = False) -> None:
        self._threads = threads
        self._packed_cache = packed_cache
        self._mlock = mlock
        self._lock = Lock()
        self._loaded: WeakValueDictionary[tuple[object, ...], Weight] = WeakValueDictionary()

    def load(self, program: Program, tensors: Mapping[str, Tensor], progress: Progress) -> dict[str, Weight]:
        check_weights(program, tensors)
        with self._lock:
            weights = {name: self._loaded.get(_key(tensors[name])) for name in program.weights}
            present = {name: weight for name, weight in weights.items() if weight is not None}
            progress(sum(tensors[name].resident_bytes for name in present))
            missing = self._load([tensors[name] for name in program.weights if name not in present], progress)
            self._loaded.update((_key(tensors[name]), weight) for name, weight in missing.items())
        return present | missing

    def held_bytes(self, tensors: Iterable[Tensor]) -> int:
        with self._lock:
            return sum(tensor.resident_bytes for tensor in tensors if _key(tensor) in self._loaded)

    def _load(self, tensors: Sequence[Tensor], progress: Progress) -> dict[str, Weight]:
        with ThreadPoolExecutor(self._threads, "load-weights") as pool:
            try:
                loaded = load_tensors(tensors, self._packed_cache, pool, progress)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        if self._mlock:
            lock_memory([*loaded.cached.values(), *loaded.packed.values()])
        if self._packed_cache is not None:
            self._packed_cache.keep(loaded.packed)
        return loaded.weights


def _key(tensor: Tensor) -> tuple[object, ...]:
    return *tensor.source, tensor.name, tensor.tile_type

"""The packed-weight cache, which stores packed tiles on disk for later loads. A layer's key is a SHA-256 of its packing
and of its bytes (or of the model file's identity and times)."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from functools import cache
from hashlib import sha256
from io import FileIO
from typing import TypeVar
from weakref import ref

from llamaclust.core.cgroups import drop_cached_pages
from llamaclust.core.disk_cache.files import reason
from llamaclust.kernels._native import Memory, packing_fingerprint
from llamaclust.kernels.backend import Progress
from llamaclust.kernels.packed.cache_folder import Entry, PackedCacheFolder
from llamaclust.kernels.packed.cache_writer import BackgroundWriter, Made, warn_not_kept
from llamaclust.kernels.packed.mapping import in_huge_pages
from llamaclust.kernels.packed.packed_layer import PackedLayer
from llamaclust.model.gguf.file_systems import is_remote
from llamaclust.model.gguf.tensors import FileIdentity, Tensor

_log = logging.getLogger(__name__)

_Result = TypeVar("_Result")

_READ_BYTES = 1 << 21
_SETTLED_NS = 100_000_000
"""The minimum age in ns at which a file's times are trusted. Some file systems count hundredths of a second."""


@dataclass(frozen=True, slots=True)
class _Found:
    layer: PackedLayer
    entry: Entry
    memory: Memory | None = None  # The mapped file, or None if the file is to be copied.


class PackedCache:
    def __init__(self, folder: PackedCacheFolder) -> None:
        self._folder = folder
        self._usable: bool | None = None
        self._keys: dict[PackedLayer, str | None] = {}  # None for a layer that is not to be stored.
        self._started_ns = time.time_ns()
        self._writer = BackgroundWriter(folder)

    def open(
        self, layers: Sequence[PackedLayer], pool: Executor, progress: Progress | None, since_ns: int | None = None
    ) -> dict[PackedLayer, Memory]:
        """Returns the intact cached layers. `since_ns` is when the load began (None: now). Raises MemoryError."""
        if not self._is_usable():
            return {}
        self._started_ns = since_ns or time.time_ns()
        found = [cached for cached in self._found(layers, pool) if cached is not None]
        passes = 1
        if not is_remote(self._folder.path):
            passes = 2
            found = _quickest(list(_counted(pool.map(self._map, found), found, passes, progress)))
        memories = _counted(pool.map(self._checked, found), found, passes, progress)
        return {cached.layer: memory for cached, memory in zip(found, memories, strict=True) if memory is not None}

    def keep(self, made: Mapping[PackedLayer, Memory]) -> None:
        if self._is_usable():
            keys = ((layer, self._keys.get(layer), memory) for layer, memory in made.items())
            self._writer.add(Made(layer, key, ref(memory), self._started_ns) for layer, key, memory in keys if key)

    def wait(self) -> None:
        self._writer.wait()

    def _is_usable(self) -> bool:
        if self._usable is None:
            try:
                self._folder.create()
                self._usable = True
            except OSError as error:
                self._usable = False
                warn_not_kept(self._folder, error)
        return self._usable and self._writer.is_usable

    def _found(self, layers: Sequence[PackedLayer], pool: Executor) -> Iterator[_Found | None]:
        """Yields the cached layers. Logs one warning for all unreadable layers, because they usually have one cause."""
        self._keys.update((layer, layer_key(layer)) for layer in layers)
        blocked: list[OSError] = []
        for layer, found in zip(layers, pool.map(self._find, layers), strict=True):
            if isinstance(found, OSError):
                self._keys[layer] = None
                blocked.append(found)
            else:
                yield found
        if blocked:
            others = f", and {len(blocked) - 1} more" if len(blocked) > 1 else ""
            what = f"{reason(blocked[0])}{others}"
            _log.warning(
                "some layers cannot be read from the packed-weight cache: %s; these layers are packed again", what
            )

    def _find(self, layer: PackedLayer) -> _Found | OSError | None:
        key = self._keys[layer]
        try:
            entry = None if key is None else self._folder.find(key)
        except OSError as error:
            return error
        if entry is not None and entry.n_bytes != layer.n_bytes:
            self._folder.discard(entry)
            return None
        return None if entry is None else _Found(layer, entry)

    def _map(self, found: _Found) -> _Found:
        try:
            file = self._folder.open_image(found.entry)
            if file is None:
                return found
            with file:
                memory = Memory.mapped(file.fileno(), found.entry.n_bytes)
        except OSError:  # Some file systems have no maps. Any other error occurs again when the file is read.
            return found
        memory.touch()
        return replace(found, memory=memory)

    def _checked(self, found: _Found) -> Memory | None:
        memory = found.memory
        try:
            if memory is None:
                file = self._folder.open_image(found.entry)
                if file is None:
                    return None
                memory = _read(file, found.entry.n_bytes)
        except OSError as error:
            _log.warning("packed layer %s cannot be read: %s", found.layer.name, reason(error))
            return None
        if memory is not None and memory.checksum() == found.entry.checksum:
            return memory
        _log.warning("packed layer %s is damaged: %s", found.layer.name, self._folder.image_path(found.entry))
        self._folder.discard(found.entry)
        return None


def layer_key(layer: PackedLayer) -> str | None:
    """Returns the hex key of a layer's cache entry, or None if the file has changed or may still change."""
    parts: list[object] = [sys.byteorder]
    for tensor in layer.tensors:
        bytes_of_it = _bytes_key(tensor)
        if bytes_of_it is None:
            return None
        kind = int(tensor.quant_type)
        parts += [tensor.name, kind, _fingerprint(kind, int(tensor.tile_type)), *bytes_of_it]
    return sha256(repr(parts).encode()).hexdigest()


def _bytes_key(tensor: Tensor) -> tuple[object, ...] | None:
    if tensor.content is not None:
        return tensor.shape, tensor.content
    try:
        found = tensor.path.stat()
    except OSError:
        return None
    newest_ns = max(found.st_mtime_ns, found.st_ctime_ns)
    if FileIdentity.from_status(found) != tensor.file_identity or time.time_ns() - newest_ns < _SETTLED_NS:
        return None
    return tensor.place, tensor.file_identity, found.st_ctime_ns


_fingerprint = cache(packing_fingerprint)


def _counted(
    results: Iterable[_Result], found: Sequence[_Found], passes: int, progress: Progress | None
) -> Iterator[_Result]:
    for result, cached in zip(results, found, strict=True):
        if progress is not None:
            progress(cached.layer.n_bytes // passes)
        yield result


def _quickest(found: Sequence[_Found]) -> list[_Found]:
    """Drops memory maps that are not in huge pages. Their layers are then copied to huge pages, which are faster."""
    maps = [cached.memory for cached in found if cached.memory is not None]
    huge = {memory.address for memory, is_huge in zip(maps, in_huge_pages(maps), strict=True) if is_huge}
    return [
        cached if cached.memory is not None and cached.memory.address in huge else replace(cached, memory=None)
        for cached in found
    ]


def _read(file: FileIO, n_bytes: int) -> Memory | None:
    done = 0
    try:
        with file:
            memory = Memory(n_bytes)
            view = memory.view.data
            while done < n_bytes and (count := file.readinto(view[done : done + _READ_BYTES])):
                done += count
            drop_cached_pages(file.fileno())
    except OSError:
        return None
    return memory if done == n_bytes else None

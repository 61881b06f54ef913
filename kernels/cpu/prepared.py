"""Prepared layers: tiles that an earlier load packed, kept on disk, for the next to map or read. Written in background.

An image is found by a key: SHA-256 over what packing makes of the layer's quant types, and which bytes of which file
went in, the file told by device, inode, size and times. Its checksum is compared each time; damage means that the layer
is packed anew.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from functools import cache
from hashlib import sha256
from pathlib import Path
from threading import Lock, Thread, get_native_id
from weakref import ref

from llamaclust.kernels.cpu._native import Memory, packing_fingerprint
from llamaclust.kernels.cpu.file_systems import is_remote
from llamaclust.kernels.cpu.huge_pages import in_huge_pages
from llamaclust.kernels.cpu.layer_image import LayerImage
from llamaclust.kernels.cpu.prepared_files import BusyError, Entry, NoRoomError, PreparedFolder
from llamaclust.model.tensors import FileIdentity

_log = logging.getLogger(__name__)

_READ_BYTES = 1 << 21
_SETTLED_NS = 100_000_000
"""Older changes of a file have other times than newer ones: file systems count in up to hundredths of a second."""

_LOWEST_PRIORITY = 19


@dataclass(frozen=True, slots=True)
class _Found:
    image: LayerImage
    key: str
    entry: Entry
    memory: Memory | None  # mapped; None where it is to be copied


@dataclass(frozen=True, slots=True)
class _Made:
    """A layer to be written as long as somebody has it."""

    image: LayerImage
    key: str
    memory: ref[Memory]
    since_ns: int  # of the load that it belongs to


class PreparedLayers:
    """The prepared layers in a folder, for one process."""

    def __init__(self, folder: PreparedFolder) -> None:
        self._folder = folder
        self._usable: bool | None = None
        self._keys: dict[LayerImage, str] = {}
        self._started_ns = time.time_ns()
        self._queue: deque[_Made] = deque()
        self._lock = Lock()
        self._writer: Thread | None = None

    def open(self, images: Sequence[LayerImage], pool: Executor) -> dict[LayerImage, Memory]:
        """Those images that are there and sound. MemoryError where the system refuses the memory."""
        if not self._is_usable():
            return {}
        self._started_ns = time.time_ns()
        self._keys = {image: key for image in images if (key := image_key(image)) is not None}
        found = [one for one in pool.map(self._find, self._keys.items()) if one is not None]
        if not is_remote(self._folder.path):
            found = _quickest(list(pool.map(self._map, found)))
        memories = pool.map(self._checked, found)
        return {one.image: memory for one, memory in zip(found, memories, strict=True) if memory is not None}

    def keep(self, made: Mapping[LayerImage, Memory]) -> None:
        """Writes images that were not there, in the background, one after the other."""
        if not self._is_usable():
            return
        with self._lock:
            for image, memory in made.items():
                if image in self._keys:
                    self._queue.append(_Made(image, self._keys[image], ref(memory), self._started_ns))
            if self._queue and self._writer is None:
                self._writer = Thread(target=self._write, name="prepare-layers", daemon=True)
                self._writer.start()

    def wait(self) -> None:
        """Until all is written."""
        with self._lock:
            writer = self._writer
        if writer is not None:
            writer.join()

    def _is_usable(self) -> bool:
        if self._usable is None:
            try:
                self._folder.prepare()
                self._usable = True
            except OSError as error:
                self._give_up(error)
        return bool(self._usable)

    def _give_up(self, error: OSError) -> None:
        self._usable = False
        what = error if error.strerror is None else f"{self._folder.path}: {error.strerror}"
        _log.warning("layers are not kept prepared on disk: %s; the next load packs them anew", what)

    def _find(self, wanted: tuple[LayerImage, str]) -> _Found | None:
        image, key = wanted
        entry = self._folder.find(key)
        if entry is None:
            return None
        if entry.n_bytes != image.n_bytes:
            self._folder.discard(key, entry)
            return None
        return _Found(image, key, entry, memory=None)

    def _map(self, found: _Found) -> _Found:
        try:
            with self._folder.image_path(found.entry).open("rb") as file:
                memory = Memory.mapped(file.fileno(), found.entry.n_bytes)
        except OSError:  # some file systems have no maps; what is the matter otherwise shows when it is read
            return found
        memory.touch()
        return replace(found, memory=memory)

    def _checked(self, found: _Found) -> Memory | None:
        """The image's memory; None where what is there is damaged, or was deleted just now."""
        try:
            memory = found.memory or _read(self._folder.image_path(found.entry), found.entry.n_bytes)
        except FileNotFoundError:
            return None
        if memory is not None and memory.checksum() == found.entry.checksum:
            return memory
        _log.warning("prepared layer %s is damaged: %s", found.image.name, self._folder.image_path(found.entry))
        self._folder.discard(found.key, found.entry)
        return None

    def _write(self) -> None:
        try:
            self._write_queue()
        except Exception:  # noqa: BLE001  the border of the thread
            _log.exception("layers are not kept prepared on disk; the next load packs them anew")
            with self._lock:
                self._usable, self._writer = False, None
                self._queue.clear()

    def _write_queue(self) -> None:
        if sys.platform == "linux":
            with contextlib.suppress(OSError):  # in a sandbox
                os.setpriority(os.PRIO_PROCESS, get_native_id(), _LOWEST_PRIORITY)
        while (made := self._next()) is not None:
            memory = made.memory()
            if memory is None:
                continue
            try:
                path = str(made.image.tensors[0].path)
                data = memory.view.data
                self._folder.store(made.key, path, made.image.name, data, memory.checksum(), made.since_ns)
            except NoRoomError as error:
                _log.info("layers from %s on are not kept prepared on disk: %s", made.image.name, error)
                self._forget()
            except BusyError as error:
                _log.warning("layers from %s on are not kept prepared on disk: %s", made.image.name, error.strerror)
                self._forget()
            except OSError as error:
                self._give_up(error)
                self._forget()

    def _forget(self) -> None:
        with self._lock:
            self._queue.clear()

    def _next(self) -> _Made | None:
        with self._lock:
            if self._queue:
                return self._queue.popleft()
            self._writer = None
            return None


def image_key(image: LayerImage) -> str | None:
    """None where the file is gone, or changed so lately that its times may not tell a further change."""
    parts: list[object] = [sys.byteorder]
    for tensor in image.tensors:
        try:
            found = tensor.path.stat()
        except OSError:
            return None
        newest_ns = max(found.st_mtime_ns, found.st_ctime_ns)
        if FileIdentity.from_status(found) != tensor.file_identity or time.time_ns() - newest_ns < _SETTLED_NS:
            return None
        kind, where = int(tensor.quant_type), (tensor.offset, tensor.n_bytes, tensor.shape)
        parts += [tensor.name, kind, _fingerprint(kind), where, tensor.file_identity, found.st_ctime_ns]
    return sha256(repr(parts).encode()).hexdigest()


_fingerprint = cache(packing_fingerprint)


def _quickest(found: Sequence[_Found]) -> list[_Found]:
    """Without the maps that are slower to compute from than a copy."""
    maps = [one.memory for one in found if one.memory is not None]
    huge = {memory.address for memory, is_huge in zip(maps, in_huge_pages(maps), strict=True) if is_huge}
    return [
        one if one.memory is not None and one.memory.address in huge else replace(one, memory=None) for one in found
    ]


def _read(path: Path, n_bytes: int) -> Memory | None:
    """A file in memory of this process; None where it is shorter or cannot be read. FileNotFoundError."""
    memory = Memory(n_bytes)
    view, done = memory.view.data, 0
    try:
        with path.open("rb", buffering=0) as file:
            while done < n_bytes and (count := os.preadv(file.fileno(), [view[done : done + _READ_BYTES]], done)):
                done += count
    except FileNotFoundError:
        raise
    except OSError:
        return None
    return memory if done == n_bytes else None

"""Prepared layers: tiles that an earlier load packed, kept on disk, for the next to map or read. Written in background.

An image is found by a key: SHA-256 over what packing makes of the layer's quant types, and which bytes of which file
went in, the file told by device, inode, size and times. Its checksum is compared each time; damage means that the layer
is packed anew.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from functools import cache
from hashlib import sha256
from pathlib import Path
from threading import Lock, Thread, get_native_id
from weakref import ref

from llamaclust.kernels.cpu._native import Memory, packing_fingerprint
from llamaclust.kernels.cpu.layer_image import LayerImage
from llamaclust.kernels.cpu.prepared_files import Entry, NoRoomError, PreparedFolder
from llamaclust.model.tensors import FileIdentity

_log = logging.getLogger(__name__)

_HUGE_PAGE_BYTES = 1 << 21
_READ_BYTES = 1 << 21
_SETTLED_NS = 100_000_000
"""Older changes of a file have other times than newer ones: file systems count in up to hundredths of a second."""

_LOWEST_PRIORITY = 19


@dataclass(frozen=True, slots=True)
class _Found:
    image: LayerImage
    key: str
    entry: Entry
    memory: Memory | None  # mapped; None where a copy is quicker to compute with


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
        mapped = [one for one in pool.map(self._map, self._keys.items()) if one is not None]
        huge = _in_huge_pages([one.memory for one in mapped if one.memory is not None])
        found = [one if is_huge else replace(one, memory=None) for one, is_huge in zip(mapped, huge, strict=True)]
        del mapped  # what will be copied is no longer mapped then
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

    def _map(self, wanted: tuple[LayerImage, str]) -> _Found | None:
        image, key = wanted
        entry = self._folder.find(key)
        if entry is None:
            return None
        if entry.n_bytes != image.n_bytes:
            self._folder.discard(key, entry)
            return None
        try:
            with self._folder.image_path(entry).open("rb") as file:
                memory = Memory.mapped(file.fileno(), entry.n_bytes)
        except OSError:
            return None
        memory.touch()
        return _Found(image, key, entry, memory)

    def _checked(self, found: _Found) -> Memory | None:
        """The image's memory; None where what is there is damaged."""
        memory = found.memory or _read(self._folder.image_path(found.entry), found.entry.n_bytes)
        if memory is not None and memory.checksum() == found.entry.checksum:
            return memory
        _log.warning("prepared layer %s is damaged: %s", found.image.name, self._folder.image_path(found.entry))
        self._folder.discard(found.key, found.entry)
        return None

    def _write(self) -> None:
        if sys.platform == "linux":
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
    """None where the file changed so lately that its times may not tell a further change."""
    parts: list[object] = [sys.byteorder]
    for tensor in image.tensors:
        found = tensor.path.stat()
        newest_ns = max(found.st_mtime_ns, found.st_ctime_ns)
        if FileIdentity.from_status(found) != tensor.file_identity or time.time_ns() - newest_ns < _SETTLED_NS:
            return None
        kind, where = int(tensor.quant_type), (tensor.offset, tensor.n_bytes, tensor.shape)
        parts += [tensor.name, kind, _fingerprint(kind), where, tensor.file_identity, found.st_ctime_ns]
    return sha256(repr(parts).encode()).hexdigest()


_fingerprint = cache(packing_fingerprint)


def _read(path: Path, n_bytes: int) -> Memory | None:
    """A file in memory of this process; None where it is not there or shorter."""
    memory = Memory(n_bytes)
    view, done = memory.view.data, 0
    try:
        with path.open("rb", buffering=0) as file:
            while done < n_bytes and (count := os.preadv(file.fileno(), [view[done : done + _READ_BYTES]], done)):
                done += count
    except OSError:
        return None
    return memory if done == n_bytes else None


def _in_huge_pages(memories: Sequence[Memory]) -> list[bool]:
    """Which of the maps are worth computing from. Without huge pages weights stream 6 to 8 % slower."""
    if _no_huge_pages():
        return [True] * len(memories)
    try:
        huge_bytes = dict(_huge_bytes(Path("/proc/self/smaps").read_text().splitlines()))
    except OSError:
        return [False] * len(memories)
    return [
        huge_bytes.get(memory.address, 0) >= 0.9 * (memory.bytes // _HUGE_PAGE_BYTES * _HUGE_PAGE_BYTES)
        for memory in memories
    ]


def _no_huge_pages() -> bool:
    """Whether this system gives none to anybody."""
    try:
        return "[never]" in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    except OSError:
        return True


def _huge_bytes(lines: Iterable[str]) -> Iterator[tuple[int, int]]:
    """Address and bytes in huge pages of the maps of files that /proc/PID/smaps lists."""
    address = 0
    for line in lines:
        if begin := re.match(r"([0-9a-f]+)-[0-9a-f]+ ", line):
            address = int(begin[1], 16)
        elif line.startswith(("FilePmdMapped:", "ShmemPmdMapped:")) and (size := int(line.split()[1])):
            yield address, size * 1024

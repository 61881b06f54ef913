"""Prepared layers: tiles that an earlier load packed, kept on disk, for the next to map or read.

An image is found by a key: SHA-256 over what packing makes of the layer's quant types, and which bytes went in, told by
their own SHA-256 where that is known, else by the file's device, inode, size and times. Its checksum is compared each
time; damage means that the layer is packed anew.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from functools import cache
from hashlib import sha256
from typing import TypeVar
from weakref import ref

from llamaclust.kernels._native import Memory, packing_fingerprint
from llamaclust.kernels.backend import Progress
from llamaclust.kernels.packed.cache_entries import Entry
from llamaclust.kernels.packed.cache_folder import PreparedFolder
from llamaclust.kernels.packed.cache_writer import BackgroundWriter, Made, reason, warn_not_kept
from llamaclust.kernels.packed.file_systems import is_remote
from llamaclust.kernels.packed.huge_pages import in_huge_pages
from llamaclust.kernels.packed.packed_layer import LayerImage
from llamaclust.model.gguf.tensors import FileIdentity, Tensor

_log = logging.getLogger(__name__)

_Result = TypeVar("_Result")

_READ_BYTES = 1 << 21
_SETTLED_NS = 100_000_000
"""Older changes of a file have other times than newer ones: file systems count in up to hundredths of a second."""


@dataclass(frozen=True, slots=True)
class _Found:
    image: LayerImage
    key: str
    entry: Entry
    memory: Memory | None  # mapped; None where it is to be copied


class PreparedLayers:
    """The prepared layers in a folder, for one process."""

    def __init__(self, folder: PreparedFolder) -> None:
        self._folder = folder
        self._usable: bool | None = None
        self._keys: dict[LayerImage, str] = {}
        self._blocked: dict[LayerImage, OSError] = {}
        self._started_ns = time.time_ns()
        self._writer = BackgroundWriter(folder)

    def open(
        self,
        images: Sequence[LayerImage],
        pool: Executor,
        progress: Progress = lambda n_bytes: None,
        since_ns: int | None = None,
    ) -> dict[LayerImage, Memory]:
        """Those images that are there and sound. `progress` hears of each piece of them. `since_ns`: when the load
        began that they belong to, where it has others. MemoryError where the system refuses the memory."""
        if not self._is_usable():
            return {}
        self._started_ns = since_ns or time.time_ns()
        self._keys = {image: key for image in images if (key := image_key(image)) is not None}
        self._blocked = {}
        found = [one for one in pool.map(self._find, self._keys.items()) if one is not None]
        self._report_blocked()
        passes = 1
        if not is_remote(self._folder.path):
            passes = 2
            found = _quickest(list(_told(pool.map(self._map, found), found, passes, progress)))
        memories = _told(pool.map(self._checked, found), found, passes, progress)
        return {one.image: memory for one, memory in zip(found, memories, strict=True) if memory is not None}

    def keep(self, made: Mapping[LayerImage, Memory]) -> None:
        """Writes images that were not there, in the background, one after the other."""
        if not self._is_usable():
            return
        since_ns = self._started_ns
        self._writer.add(
            Made(image, self._keys[image], ref(memory), since_ns)
            for image, memory in made.items()
            if image in self._keys and image not in self._blocked
        )

    def wait(self) -> None:
        """Until all is written."""
        self._writer.wait()

    def _is_usable(self) -> bool:
        if self._usable is None:
            try:
                self._folder.prepare()
                self._usable = True
            except OSError as error:
                self._usable = False
                warn_not_kept(self._folder, error)
        return self._usable and self._writer.is_usable

    def _report_blocked(self) -> None:
        """Once a load: where one file is in the way, all may be."""
        if self._blocked:
            first, more = next(iter(self._blocked.values())), len(self._blocked) - 1
            others = f", and {more} more" if more else ""
            _log.warning("prepared layers cannot be used: %s%s; they are packed anew", reason(first), others)

    def _find(self, wanted: tuple[LayerImage, str]) -> _Found | None:
        image, key = wanted
        try:
            entry = self._folder.find(key)
        except OSError as error:
            self._blocked[image] = error
            return None
        if entry is None:
            return None
        if entry.n_bytes != image.n_bytes:
            self._folder.discard(key, entry)
            return None
        return _Found(image, key, entry, memory=None)

    def _map(self, found: _Found) -> _Found:
        try:
            descriptor = self._folder.open_image(found.entry)
            if descriptor is None:
                return found
            try:
                memory = Memory.mapped(descriptor, found.entry.n_bytes)
            finally:
                os.close(descriptor)
        except OSError:  # some file systems have no maps; what is the matter otherwise shows when it is read
            return found
        memory.touch()
        return replace(found, memory=memory)

    def _checked(self, found: _Found) -> Memory | None:
        """The image's memory; None where what is there is damaged, or was deleted just now."""
        memory = found.memory
        try:
            if memory is None:
                descriptor = self._folder.open_image(found.entry)
                if descriptor is None:
                    return None
                memory = _read(descriptor, found.entry.n_bytes)
        except OSError as error:
            _log.warning("prepared layer %s cannot be read: %s", found.image.name, reason(error))
            return None
        if memory is not None and memory.checksum() == found.entry.checksum:
            return memory
        _log.warning("prepared layer %s is damaged: %s", found.image.name, self._folder.image_path(found.entry))
        self._folder.discard(found.key, found.entry)
        return None


def image_key(image: LayerImage) -> str | None:
    """None where the file is gone, or changed so lately that its times may not tell a further change."""
    parts: list[object] = [sys.byteorder]
    for tensor in image.tensors:
        bytes_of_it = _bytes_key(tensor)
        if bytes_of_it is None:
            return None
        kind = int(tensor.quant_type)
        parts += [tensor.name, kind, _fingerprint(kind), *bytes_of_it]
    return sha256(repr(parts).encode()).hexdigest()


def _bytes_key(tensor: Tensor) -> tuple[object, ...] | None:
    """Which bytes they are: by their SHA-256 where that is known, else by their place in a file."""
    if tensor.content is not None:
        return tensor.shape, tensor.content
    try:
        found = tensor.path.stat()
    except OSError:
        return None
    newest_ns = max(found.st_mtime_ns, found.st_ctime_ns)
    if FileIdentity.from_status(found) != tensor.file_identity or time.time_ns() - newest_ns < _SETTLED_NS:
        return None
    return (tensor.offset, tensor.n_bytes, tensor.shape), tensor.file_identity, found.st_ctime_ns


_fingerprint = cache(packing_fingerprint)


def _told(results: Iterable[_Result], found: Sequence[_Found], passes: int, progress: Progress) -> Iterator[_Result]:
    """The results of one of so many passes over what was found, each told as its share of the bytes."""
    for result, one in zip(results, found, strict=True):
        progress(one.image.n_bytes // passes)
        yield result


def _quickest(found: Sequence[_Found]) -> list[_Found]:
    """Without the maps that are slower to compute from than a copy."""
    maps = [one.memory for one in found if one.memory is not None]
    huge = {memory.address for memory, is_huge in zip(maps, in_huge_pages(maps), strict=True) if is_huge}
    return [
        one if one.memory is not None and one.memory.address in huge else replace(one, memory=None) for one in found
    ]


def _read(descriptor: int, n_bytes: int) -> Memory | None:
    """A file in memory of this process; None where it is shorter or the disk fails. Closes it."""
    done = 0
    try:
        memory = Memory(n_bytes)
        view = memory.view.data
        while done < n_bytes and (count := os.preadv(descriptor, [view[done : done + _READ_BYTES]], done)):
            done += count
    except OSError:
        return None
    finally:
        os.close(descriptor)
    return memory if done == n_bytes else None

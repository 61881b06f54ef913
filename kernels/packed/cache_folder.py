"""The folder of the packed-weight cache: entries by key, images by the SHA-256 of their bytes.

A file is renamed into place when complete and never changed, so existing maps stay valid.
One process writes at a time; readers need no lock.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import stat
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from io import FileIO
from pathlib import Path
from typing import Any

from llamaclust.core.sizes import mib
from llamaclust.kernels.packed import cache_files

_FREE_SHARE, _FREE_BYTES = 20, 2 << 30
"""Reserved free space of the disk: a twentieth of it, at most 2 GiB."""

_MOST_ENTRY_BYTES = 1 << 18
"""Names are short, the path of a model file at most 4096 bytes."""

_PATTERNS = ("*.json", "*.tiles", "*.tmp")


class NoRoomError(OSError):
    """An image that may not be written, with the reason."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A cached layer; its key covers everything its image depends on."""

    key: str  # also the name of its file: a moved or copied entry is invalid
    model: str
    layer: str
    image: str  # SHA-256 of its bytes, in hex
    n_bytes: int
    checksum: int


_FIELDS = {field.name: int if field.type == "int" else str for field in fields(Entry)}


def _read_entry(path: Path) -> Entry | None:
    """None if it is missing or damaged. OSError as of `open_regular`."""
    try:
        with cache_files.open_regular(path) as file:
            data = file.read(_MOST_ENTRY_BYTES + 1)
    except FileNotFoundError:
        return None
    try:
        found: Any = json.loads(data) if len(data) <= _MOST_ENTRY_BYTES else None
        is_sound = {name: type(value) for name, value in found.items()} == _FIELDS
    except (ValueError, TypeError, AttributeError, RecursionError):
        return None
    if not is_sound or found["key"] != path.stem or not re.fullmatch("[0-9a-f]{64}", found["image"]):
        return None
    return Entry(**found)


@dataclass(frozen=True, slots=True)
class Listed:
    """What the folder holds of one model file; layers that another one also has count in both."""

    model: str
    parts: int  # layers, and what is in none: embedding and output
    size_bytes: int
    used_ns: int


@dataclass(frozen=True, slots=True)
class Cleared:
    """The number and size of deleted files, and the errors of those left."""

    files: int
    size_bytes: int
    left: tuple[OSError, ...]


@dataclass(frozen=True, slots=True)
class PackedCacheFolder:
    """`path` and how many bytes of images it may hold. It is made by `create`, for this user alone."""

    path: Path
    most_bytes: int

    def create(self) -> None:
        """Makes the folder. OSError if that fails or other users may write there: they could plant weights."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.mkdir(mode=0o700, exist_ok=True)
        found = self.path.stat()
        if found.st_uid != os.geteuid():
            raise PermissionError(f"{self.path}: belongs to another user (id {found.st_uid})")
        if stat.S_IMODE(found.st_mode) & 0o022:
            raise PermissionError(f"{self.path}: others may write there (mode {stat.S_IMODE(found.st_mode):o})")

    def image_path(self, entry: Entry) -> Path:
        return self.path / f"{entry.image}.tiles"

    def find(self, key: str) -> Entry | None:
        """The entry of that key if its image is there with the right size; it counts as used now.
        OSError with the name of what cannot be read, or is in the way and cannot be deleted."""
        try:
            entry = _read_entry(self.path / f"{key}.json")
        except cache_files.NotAFileError as error:
            cache_files.drop(error)
            return None
        return entry if entry is not None and self._has_image(entry) else None

    def open_image(self, entry: Entry) -> FileIO | None:
        """A file of the right size. None where there is none; what else lies there is deleted, OSError
        with its name where that fails."""
        path = self.image_path(entry)
        try:
            file = cache_files.open_regular(path)
        except FileNotFoundError:
            return None
        except cache_files.NotAFileError as error:
            cache_files.drop(error)
            return None
        if os.fstat(file.fileno()).st_size == entry.n_bytes:
            return file
        file.close()
        cache_files.remove(path)
        return None

    def discard(self, entry: Entry) -> None:
        """Deletes an entry and its image; existing maps stay valid."""
        cache_files.remove(self.path / f"{entry.key}.json")
        cache_files.remove(self.image_path(entry))

    def store(self, entry: Entry, data: memoryview, since_ns: int, writing: cache_files.Writing) -> None:
        """Writes an entry, and its image if that is not there. To make room, those go that were not used since
        `since_ns`, the oldest first. OSError where it cannot be written, NoRoomError where it may not, BusyError where
        others write long, StoppedError soon after `writing` was stopped."""
        with cache_files.locked(self.path / "lock", writing):
            for left, _ in self._files("*.tmp"):  # of killed processes: the lock excludes other writers
                cache_files.remove(left)
            if self.find(entry.key) is not None:
                return
            if not self._has_image(entry):
                self._make_room(len(data), since_ns)
                cache_files.write_whole(self.image_path(entry), data, writing)
            cache_files.write_whole(self.path / f"{entry.key}.json", json.dumps(asdict(entry)).encode(), writing)

    def list_models(self) -> list[Listed]:
        """What is there, by model."""
        models: dict[str, dict[str, os.stat_result]] = {}
        for path in sorted(self.path.glob("*.json")):
            with contextlib.suppress(OSError):
                entry = _read_entry(path)
                found = None if entry is None else self.image_path(entry).lstat()
                if entry is not None and found is not None and stat.S_ISREG(found.st_mode):
                    models.setdefault(entry.model, {})[entry.image] = found
        return [
            Listed(model, len(images), _total(images.values()), max(image.st_mtime_ns for image in images.values()))
            for model, images in sorted(models.items())
        ]

    def in_the_way(self) -> list[Path]:
        """Links, directories and the like with the name of a file of this folder."""
        paths = (path for pattern in (*_PATTERNS, "lock") for path in self.path.glob(pattern))
        return sorted(path for path in paths if path.is_symlink() or not path.is_file())

    def unfinished_bytes(self) -> list[int]:
        """Sizes of the files that are being written, or were left by a process that was killed meanwhile."""
        return [found.st_size for _, found in self._files("*.tmp")]

    def used_bytes(self) -> int:
        """Bytes of all images; an image of several models counts once."""
        return _total(found for _, found in self._files("*.tiles"))

    def clear(self) -> Cleared:
        """Deletes what can be deleted. Processes that use the files continue. OSError if no file can be deleted,
        BusyError if another process writes for long."""
        if not self.path.is_dir():
            return Cleared(0, 0, ())
        files, size_bytes, left = 0, 0, []
        lock = self.path / "lock"
        if lock in self.in_the_way():
            cache_files.delete(lock)
        with cache_files.locked(lock, cache_files.Writing()):
            for path in sorted({path for pattern in _PATTERNS for path in self.path.glob(pattern)}):
                try:
                    size_bytes += cache_files.delete(path)
                    files += 1
                except FileNotFoundError:
                    continue
                except OSError as error:
                    left.append(error)
        return Cleared(files, size_bytes, tuple(left))

    def _files(self, pattern: str) -> Iterator[tuple[Path, os.stat_result]]:
        """Skips files that other processes delete meanwhile, as deleting needs no lock."""
        for path in self.path.glob(pattern):
            with contextlib.suppress(FileNotFoundError):
                found = path.lstat()
                if stat.S_ISREG(found.st_mode):
                    yield path, found

    def _has_image(self, entry: Entry) -> bool:
        """Whether the image is there with the right size; it counts as used now."""
        file = self.open_image(entry)
        if file is None:
            return False
        with file:
            cache_files.mark_used(file.fileno())
        return True

    def _make_room(self, n_bytes: int, since_ns: int) -> None:
        images = sorted(self._files("*.tiles"), key=lambda image: image[1].st_mtime_ns)
        held_bytes, evicted = _total(found for _, found in images), False
        disk = os.statvfs(self.path)
        kept_bytes = min(disk.f_blocks * disk.f_frsize // _FREE_SHARE, _FREE_BYTES)
        room_bytes = disk.f_bavail * disk.f_frsize - kept_bytes
        for path, found in images:
            if held_bytes + n_bytes <= self.most_bytes and n_bytes <= room_bytes:
                break
            if found.st_mtime_ns >= since_ns:
                continue
            path.unlink(missing_ok=True)
            held_bytes, room_bytes, evicted = held_bytes - found.st_size, room_bytes + found.st_size, True
        if evicted:
            self._forget_missing()
        if held_bytes + n_bytes > self.most_bytes:
            raise NoRoomError(f"{mib(held_bytes + n_bytes)} MiB, {self.most_bytes >> 20} MiB are allowed")
        if n_bytes > room_bytes:
            raise NoRoomError(
                f"{mib(kept_bytes)} MiB of the disk are to stay free, {mib(n_bytes)} MiB more would not leave that"
            )

    def _forget_missing(self) -> None:
        for path, _ in self._files("*.json"):
            with contextlib.suppress(OSError):
                entry = _read_entry(path)
                if entry is None or not self.image_path(entry).exists():
                    path.unlink(missing_ok=True)


def _total(found: Iterable[os.stat_result]) -> int:
    return sum(status.st_size for status in found)

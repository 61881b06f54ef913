"""The folder of the packed-weight cache: entries by key, images by the SHA-256 of their bytes.

A file is renamed into place when complete and never changed, so existing maps stay valid.
One process writes at a time; readers need no lock.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import stat
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from llamaclust.core.sizes import mib
from llamaclust.kernels.packed.cache_entries import Entry, NotAFileError, open_regular, read_entry

_log = logging.getLogger(__name__)

_WRITE_BYTES = 1 << 21
"""One write call, at a multiple of it: some file systems then keep the file in huge pages (ext4 of Linux 6.16)."""

_FREE_SHARE, _FREE_BYTES = 20, 2 << 30
"""Reserved free space of the disk: a twentieth of it, at most 2 GiB."""

_LOCK_WAIT_S = 10.0
"""How long a writer waits for another one, which has the lock while it writes one image."""

_LOCK_RETRY_S = 0.02


_PATTERNS = ("*.json", "*.tiles", "*.tmp")


class BusyError(OSError):
    """Another process has the lock."""


class NoRoomError(OSError):
    """An image that may not be written, with the reason."""


class StoppedError(Exception):
    """A stopped write."""


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


class Writing:
    """The state of a writer, and the means to stop it."""

    def __init__(self) -> None:
        self.is_stopped = False
        self.waits = False  # for the lock
        self.unfinished: Path | None = None


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
            entry = read_entry(self._entry_path(key))
        except NotAFileError as error:
            _drop(error)
            return None
        if entry is None or not self._has_image(entry):
            return None
        return entry

    def open_image(self, entry: Entry) -> int | None:
        """A descriptor of a file of the right size. None where there is none; what else lies there is deleted, OSError
        with its name where that fails."""
        path = self.image_path(entry)
        try:
            descriptor = open_regular(path)
        except FileNotFoundError:
            return None
        except NotAFileError as error:
            _drop(error)
            return None
        if os.fstat(descriptor).st_size == entry.n_bytes:
            return descriptor
        os.close(descriptor)
        _remove(path)
        return None

    def discard(self, key: str, entry: Entry) -> None:
        """Deletes an entry and its image; existing maps stay valid."""
        for path in (self._entry_path(key), self.image_path(entry)):
            _remove(path)

    def store(
        self, key: str, model: str, layer: str, data: memoryview, checksum: int, since_ns: int, writing: Writing
    ) -> None:
        """Writes an entry, and its image if that is not there. To make room, those go that were not used since
        `since_ns`, the oldest first. OSError where it cannot be written, NoRoomError where it may not, BusyError where
        others write long, StoppedError soon after `writing` was stopped."""
        if self.find(key) is not None:
            return
        entry = Entry(key, model, layer, sha256(data).hexdigest(), len(data), checksum)
        with self._locked(writing):
            for left, _ in self._files("*.tmp"):  # of killed processes: the lock excludes other writers
                _remove(left)
            if self.find(key) is not None:
                return
            if not self._has_image(entry):
                self._make_room(len(data), since_ns)
                _write(self.image_path(entry), data, writing)
            _write(self._entry_path(key), memoryview(entry.as_bytes()), writing)

    def list_models(self) -> list[Listed]:
        """What is there, by model."""
        models: dict[str, dict[str, os.stat_result]] = {}
        for path in sorted(self.path.glob("*.json")):
            with contextlib.suppress(OSError):
                entry = read_entry(path)
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
            _delete(lock)
        with self._locked(Writing()):
            for path in sorted({path for pattern in _PATTERNS for path in self.path.glob(pattern)}):
                try:
                    size_bytes += _delete(path)
                    files += 1
                except FileNotFoundError:
                    continue
                except OSError as error:
                    left.append(error)
        return Cleared(files, size_bytes, tuple(left))

    def _entry_path(self, key: str) -> Path:
        return self.path / f"{key}.json"

    def _files(self, pattern: str) -> Iterator[tuple[Path, os.stat_result]]:
        """Skips files that other processes delete meanwhile, as deleting needs no lock."""
        for path in self.path.glob(pattern):
            with contextlib.suppress(FileNotFoundError):
                found = path.lstat()
                if stat.S_ISREG(found.st_mode):
                    yield path, found

    def _has_image(self, entry: Entry) -> bool:
        """Whether the image is there with the right size; it counts as used now."""
        descriptor = self.open_image(entry)
        if descriptor is None:
            return False
        try:
            _use(descriptor)
        finally:
            os.close(descriptor)
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
                entry = read_entry(path)
                if entry is None or not self.image_path(entry).exists():
                    path.unlink(missing_ok=True)

    @contextmanager
    def _locked(self, writing: Writing) -> Iterator[None]:
        descriptor = open_regular(self.path / "lock", os.O_RDWR | os.O_CREAT)
        try:
            _lock(descriptor, writing)
            yield
        finally:
            os.close(descriptor)


def _write(path: Path, data: memoryview, writing: Writing) -> None:
    """A whole file or none."""
    made = path.with_suffix(".tmp")
    try:
        file = made.open("xb", buffering=0)
    except FileExistsError:
        raise NotAFileError(errno.EEXIST, "is in the way", str(made)) from None
    writing.unfinished = made
    try:
        with file:
            for start in range(0, len(data), _WRITE_BYTES):
                if writing.is_stopped:
                    raise StoppedError
                _write_all(file.fileno(), data[start : start + _WRITE_BYTES])
            os.fsync(file.fileno())
            _use(file.fileno())
        made.rename(path)
    finally:
        _remove(made)
        writing.unfinished = None


def _lock(descriptor: int, writing: Writing) -> None:
    deadline, writing.waits = time.monotonic() + _LOCK_WAIT_S, True
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            writing.waits = False
            return
        except BlockingIOError:
            if writing.is_stopped:
                raise StoppedError from None
            if time.monotonic() >= deadline:
                reason = f"another process has written there for {_LOCK_WAIT_S:g} s; try again later"
                raise BusyError(errno.EAGAIN, reason) from None
            time.sleep(_LOCK_RETRY_S)


def _use(descriptor: int) -> None:
    """Not by the kernel's clock, which is some milliseconds behind the one of `since_ns`."""
    now_ns = time.time_ns()
    os.utime(descriptor, ns=(now_ns, now_ns))


def _drop(found: NotAFileError) -> None:
    """Deletes a path that is no regular file. OSError that names it if that fails."""
    try:
        Path(found.filename).unlink()
    except FileNotFoundError:
        return
    except OSError:
        raise found from None
    _log.warning("%s was no regular file; it is deleted", found.filename)


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()


def _delete(path: Path) -> int:
    """Also an empty directory; its size. OSError with its name."""
    found = path.lstat()
    if stat.S_ISDIR(found.st_mode):
        path.rmdir()
    else:
        path.unlink()
    return found.st_size if stat.S_ISREG(found.st_mode) else 0


def _write_all(descriptor: int, data: memoryview) -> None:
    done = 0
    while done < len(data):
        done += os.write(descriptor, data[done:])


def _total(found: Iterable[os.stat_result]) -> int:
    return sum(status.st_size for status in found)

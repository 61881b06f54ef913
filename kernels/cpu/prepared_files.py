"""The folder of prepared layers: entries that say what is there, images by the SHA-256 of their bytes. No arithmetic.

A file gets its name only when it is whole, and is never changed after that: whoever has it mapped keeps what it mapped.
One process writes at a time; readers need no lock.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import stat
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path

from llamaclust.sizes import mib

_WRITE_BYTES = 1 << 21
"""One write call, at a multiple of it: some file systems then keep the file in huge pages (ext4 of Linux 6.16)."""

_FREE_SHARE = 10
"""A tenth of the disk is left free."""


_LOCK_WAIT_S = 10.0
"""How long a writer waits for another one, which has the lock while it writes one image."""

_LOCK_RETRY_S = 0.02


class BusyError(OSError):
    """Another process has the lock."""


class NoRoomError(OSError):
    """An image that may not be written, with the reason."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A layer that is prepared; found by a key made of all that its image depends on."""

    model: str
    layer: str
    image: str  # SHA-256 of its bytes, in hex
    n_bytes: int
    checksum: int


_ENTRY_FIELDS: dict[str, type] = {"model": str, "layer": str, "image": str, "n_bytes": int, "checksum": int}


@dataclass(frozen=True, slots=True)
class Listed:
    """What the folder holds of one model file; layers that another one also has count in both."""

    model: str
    parts: int  # layers, and what is in none: embedding and output
    size_bytes: int
    used_ns: int


@dataclass(frozen=True, slots=True)
class PreparedFolder:
    """`path` and how many bytes of images it may hold. It is made by `prepare`, for this user alone."""

    path: Path
    most_bytes: int

    def prepare(self) -> None:
        """Makes the folder. OSError where that fails, or where others may write there: they could plant weights."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.mkdir(mode=0o700, exist_ok=True)
        found = self.path.stat()
        if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o022:
            raise PermissionError(f"{self.path}: others may write there")

    def image_path(self, entry: Entry) -> Path:
        return self.path / f"{entry.image}.tiles"

    def find(self, key: str) -> Entry | None:
        """The entry of that key if its image is there with the right size; it counts as used now."""
        entry = _read_entry(self._entry_path(key))
        if entry is None:
            return None
        path = self.image_path(entry)
        try:
            if path.stat().st_size != entry.n_bytes:
                self.discard(key, entry)
                return None
            _use(path)
        except OSError:
            return None
        return entry

    def discard(self, key: str, entry: Entry) -> None:
        """Deletes an entry and its image; whoever has that mapped keeps it."""
        for path in (self._entry_path(key), self.image_path(entry)):
            with contextlib.suppress(OSError):
                path.unlink()

    def store(self, key: str, model: str, layer: str, data: memoryview, checksum: int, since_ns: int) -> None:
        """Writes an entry, and its image if that is not there. To make room, those go that were not used since
        `since_ns`, the oldest first. OSError where it cannot be written, NoRoomError where it may not, BusyError where
        others write long."""
        if self.find(key) is not None:
            return
        entry = Entry(model, layer, sha256(data).hexdigest(), len(data), checksum)
        with self._locked():
            for left in self.path.glob("*.tmp"):  # by a process that was killed: who has the lock is the only one
                left.unlink(missing_ok=True)
            if self.find(key) is not None:
                return
            if not self._has_image(entry):
                self._make_room(len(data), since_ns)
                self._write(self.image_path(entry), data)
            self._write(self._entry_path(key), memoryview(json.dumps(asdict(entry)).encode()))

    def list_models(self) -> list[Listed]:
        """What is there, by model."""
        models: dict[str, dict[str, os.stat_result]] = {}
        for path in sorted(self.path.glob("*.json")):
            entry = _read_entry(path)
            with contextlib.suppress(OSError):
                if entry is not None:
                    models.setdefault(entry.model, {})[entry.image] = self.image_path(entry).stat()
        return [
            Listed(model, len(images), _total(images.values()), max(image.st_mtime_ns for image in images.values()))
            for model, images in sorted(models.items())
        ]

    def used_bytes(self) -> int:
        """What all images take; those of several models, such as copies of one file, once."""
        return _total(found for _, found in self._files("*.tiles"))

    def clear(self) -> tuple[int, int]:
        """Deletes all of it; how many files and bytes that were. Processes that use them go on.
        OSError where that fails, BusyError where others write long."""
        if not self.path.is_dir():
            return 0, 0
        with self._locked():
            files = [one for pattern in ("*.json", "*.tiles", "*.tmp") for one in self._files(pattern)]
            for path, _ in files:
                path.unlink(missing_ok=True)
        return len(files), _total(found for _, found in files)

    def _entry_path(self, key: str) -> Path:
        return self.path / f"{key}.json"

    def _files(self, pattern: str) -> Iterator[tuple[Path, os.stat_result]]:
        """Without those that other processes delete meanwhile: to drop an entry takes no lock."""
        for path in self.path.glob(pattern):
            with contextlib.suppress(FileNotFoundError):
                yield path, path.stat()

    def _has_image(self, entry: Entry) -> bool:
        """Whether the image is there with the right size, for another entry; it counts as used now."""
        path = self.image_path(entry)
        try:
            if path.stat().st_size != entry.n_bytes:
                return False
            _use(path)
        except FileNotFoundError:
            return False
        return True

    def _make_room(self, n_bytes: int, since_ns: int) -> None:
        images = sorted(self._files("*.tiles"), key=lambda one: one[1].st_mtime_ns)
        held_bytes, evicted = _total(found for _, found in images), False
        disk = os.statvfs(self.path)
        room_bytes = (disk.f_bavail - disk.f_blocks // _FREE_SHARE) * disk.f_frsize
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
            raise NoRoomError(f"a tenth of the disk is to stay free, {mib(n_bytes)} MiB more would not leave that")

    def _forget_missing(self) -> None:
        for path in self.path.glob("*.json"):
            entry = _read_entry(path)
            if entry is None or not self.image_path(entry).exists():
                path.unlink(missing_ok=True)

    def _write(self, path: Path, data: memoryview) -> None:
        made = path.with_suffix(".tmp")
        try:
            with made.open("xb", buffering=0) as file:
                for start in range(0, len(data), _WRITE_BYTES):
                    _write_all(file.fileno(), data[start : start + _WRITE_BYTES])
                os.fsync(file.fileno())
            _use(made)
            made.rename(path)
        finally:
            made.unlink(missing_ok=True)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        descriptor = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            _lock(descriptor)
            yield
        finally:
            os.close(descriptor)


def _lock(descriptor: int) -> None:
    deadline = time.monotonic() + _LOCK_WAIT_S
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() >= deadline:
                reason = f"another process has written there for {_LOCK_WAIT_S:g} s; try again later"
                raise BusyError(errno.EAGAIN, reason) from None
            time.sleep(_LOCK_RETRY_S)


def _use(path: Path) -> None:
    """Not by the kernel's clock, which is some milliseconds behind the one of `since_ns`."""
    now_ns = time.time_ns()
    os.utime(path, ns=(now_ns, now_ns))


def _write_all(descriptor: int, data: memoryview) -> None:
    done = 0
    while done < len(data):
        done += os.write(descriptor, data[done:])


def _total(found: Iterable[os.stat_result]) -> int:
    return sum(one.st_size for one in found)


def _read_entry(path: Path) -> Entry | None:
    """None where there is none, or a damaged one."""
    try:
        said = json.loads(path.read_bytes())
        is_sound = set(said) == _ENTRY_FIELDS.keys() and all(type(said[name]) is _ENTRY_FIELDS[name] for name in said)
    except (OSError, ValueError, TypeError):
        return None
    return Entry(**said) if is_sound and re.fullmatch("[0-9a-f]{64}", said["image"]) else None

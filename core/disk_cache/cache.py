"""A folder of one user's cached files, with a limited size. One process writes at a time. Readers need no lock."""

from __future__ import annotations

import errno
import logging
import os
import stat
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import ClassVar

from llamaclust.core.disk_cache import files
from llamaclust.core.disk_cache.files import BusyError, ForeignFileError, Writing
from llamaclust.core.sizes import MIB, mib

_log = logging.getLogger(__name__)

_FREE_SHARE = 20
"""The cache leaves 1/20 of the disk free, or `free_bytes` if that is smaller."""

_LOCK = "lock"
NEVER_NS = 1 << 63


class NoRoomError(OSError):
    """The cache's limit or the free space on the disk is too small for a file."""


@dataclass(frozen=True, slots=True)
class CachedFile:
    path: Path
    size_bytes: int
    used_ns: int


@dataclass(frozen=True, slots=True)
class Cleared:
    files: int = 0
    size_bytes: int = 0
    left: tuple[OSError, ...] = ()


@dataclass(frozen=True, slots=True)
class DiskCache:
    """A cache of the files in `path` whose names end with one of `suffixes`. Other files there are not touched."""

    path: Path
    most_bytes: int

    suffixes: ClassVar[tuple[str, ...]]
    content: ClassVar[str]  # Name of the cached content, for messages.
    limit: ClassVar[str]  # Name of the setting for `most_bytes`, for messages.
    most_files: ClassVar[int] = 1 << 16
    free_bytes: ClassVar[int] = 2 << 30
    is_secret: ClassVar[bool] = False  # Other users must not be able to read the files.
    is_synced: ClassVar[bool] = True  # A file is flushed to the disk before it gets its name.
    # Modification time of all intact files, or None. A file with another time is damaged.
    modified_ns: ClassVar[int | None] = None

    def create(self) -> None:
        """Creates the folder. Raises OSError, for example if `path` is a link or if other users could write to it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            self.path.mkdir(mode=0o700)
        mode = stat.S_IMODE(self._check_owner().st_mode)
        if mode & (0o077 if self.is_secret else 0o022):
            what = "other users may enter the folder" if self.is_secret else "other users may write to the folder"
            raise PermissionError(errno.EPERM, f"{what} (mode {mode:o})", str(self.path))

    def open(self, name: str, *, is_use: bool = True) -> FileIO | None:
        """Opens a file, or returns None if it is absent, was changed, or belongs to another user. Raises OSError."""
        path = self.path / name
        try:
            file = files.open_own(path)
        except FileNotFoundError:
            return None
        except ForeignFileError as error:
            _drop_foreign(path, error)
            return None
        found = files.mark_used(file.fileno()) if is_use else os.fstat(file.fileno())
        if self.modified_ns in (None, found.st_mtime_ns):
            return file
        file.close()
        self.drop(name, "it was changed after it was written")
        return None

    def read(self, name: str, most_bytes: int, *, is_use: bool = True) -> bytes | None:
        file = self.open(name, is_use=is_use)
        if file is None:
            return None
        with file:
            return file.read(most_bytes)

    def write(
        self,
        name: str,
        parts: Sequence[bytes | memoryview],
        *,
        since_ns: int = NEVER_NS,
        kept: Container[str] = (),
        writing: Writing | None = None,
    ) -> None:
        """Writes a file unless it exists. To make room, deletes files that were last used before `since_ns` and are not
        in `kept`. Raises NoRoomError, BusyError, StoppedError or another OSError. Leaves no incomplete file."""
        n_bytes, writing = sum(map(len, parts)), writing or Writing()
        with self.locked(writing):
            if not self._has(name, n_bytes):
                self._make_room(n_bytes, since_ns, kept)
                files.write_whole(self.path / name, parts, writing, self.modified_ns, is_synced=self.is_synced)

    @contextmanager
    def locked(self, writing: Writing | None = None) -> Iterator[None]:
        """Holds the writers' lock and deletes temporary files of killed writers. Raises BusyError or StoppedError."""
        with files.locked(self.path / _LOCK, writing or Writing()):
            for file in self.files(files.TEMPORARY):
                files.remove(file.path)
            yield

    def drop(self, name: str, why: str) -> None:
        _log.warning("%s: %s; it is deleted", self.path / name, why)
        files.remove(self.path / name)

    def files(self, *suffixes: str) -> list[CachedFile]:
        """Returns the files with these suffixes (default: the cache's own), the least recently used file first."""
        found = []
        with suppress(FileNotFoundError), os.scandir(self.path) as entries:
            for entry in entries:
                if entry.name.endswith(suffixes or self.suffixes):
                    # Another process may delete the file meanwhile, because deleting needs no lock.
                    with suppress(FileNotFoundError):
                        status = entry.stat(follow_symlinks=False)
                        if stat.S_ISREG(status.st_mode):
                            found.append(CachedFile(Path(entry.path), status.st_size, files.used_ns(status)))
        return sorted(found, key=lambda file: file.used_ns)

    @property
    def used_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files())

    def in_the_way(self) -> list[Path]:
        return sorted(path for path in self._names(_LOCK) if path.is_symlink() or not path.is_file())

    def clear(self) -> Cleared:
        """Deletes all cached files. Raises OSError, or BusyError if a load uses the cache or another process writes."""
        if not os.path.lexists(self.path):
            return Cleared()
        self._check_owner()
        lock = self.path / _LOCK
        if lock in self.in_the_way():
            files.delete(lock)
        count, size_bytes, left = 0, 0, []
        with files.locked(lock, Writing()):
            if self._needed_since_ns() != NEVER_NS:
                raise BusyError(errno.EAGAIN, "a load is using the cache; try again later")
            for path in sorted(self._names()):
                try:
                    size_bytes += files.delete(path)
                    count += 1
                except FileNotFoundError:
                    continue
                except OSError as error:
                    left.append(error)
        return Cleared(count, size_bytes, tuple(left))

    def _needed_since_ns(self) -> int:
        """Returns a time in ns. Files used at or after that time must be kept. The caller holds the lock."""
        return NEVER_NS

    def _make_room(self, n_bytes: int, since_ns: int = NEVER_NS, kept: Container[str] = ()) -> None:
        """Deletes least recently used files until `n_bytes` fit, or raises NoRoomError. Deletes nothing if all
        deletions together would not suffice. The caller holds the lock."""
        held, since_ns = self.files(), min(since_ns, self._needed_since_ns())
        unneeded = [file for file in held if file.used_ns < since_ns and file.path.name not in kept]
        held_bytes, count = sum(file.size_bytes for file in held), len(held)
        disk = os.statvfs(self.path)
        free_bytes = disk.f_bavail * disk.f_frsize
        reserved_bytes = min(disk.f_blocks * disk.f_frsize // _FREE_SHARE, self.free_bytes)
        self._check_room(n_bytes, held_bytes, free_bytes, reserved_bytes, sum(file.size_bytes for file in unneeded))
        for file in unneeded:
            fits = held_bytes + n_bytes <= self.most_bytes and n_bytes <= free_bytes - reserved_bytes
            if fits and count < self.most_files:
                return
            if _delete(file.path):
                held_bytes, free_bytes, count = held_bytes - file.size_bytes, free_bytes + file.size_bytes, count - 1
        self._check_room(n_bytes, held_bytes, free_bytes, reserved_bytes)

    def _check_room(
        self, n_bytes: int, held_bytes: int, free_bytes: int, reserved_bytes: int, unneeded_bytes: int = 0
    ) -> None:
        more, used_bytes = f"{mib(n_bytes)} MiB more of {self.content}", held_bytes - unneeded_bytes
        if used_bytes + n_bytes > self.most_bytes:
            allowed = f"the limit is {mib(self.most_bytes)} MiB ({self.limit})"
            raise NoRoomError(f"{self.path}: {more} do not fit: {mib(used_bytes)} MiB are in use, and {allowed}")
        if n_bytes > free_bytes + unneeded_bytes - reserved_bytes:
            free_mib, stays = free_bytes // MIB, f" ({mib(reserved_bytes)} must stay free)"
            what = f"the disk has {free_mib} MiB free{stays if reserved_bytes else ''}, but {more} are needed"
            raise NoRoomError(f"{self.path}: {what}; make room there, or set LLAMACLUST_HOME to another disk")

    def _names(self, *others: str) -> Iterator[Path]:
        for path in self.path.iterdir() if self.path.is_dir() else ():
            if path.name.endswith((*self.suffixes, files.TEMPORARY)) or path.name in others:
                yield path

    def _has(self, name: str, n_bytes: int) -> bool:
        file = self.open(name)
        if file is None:
            return False
        with file:
            return os.fstat(file.fileno()).st_size == n_bytes

    def _check_owner(self) -> os.stat_result:
        found = self.path.lstat()
        if stat.S_ISLNK(found.st_mode):
            why = "is a symbolic link; set LLAMACLUST_HOME to use another disk"
            raise PermissionError(errno.EPERM, why, str(self.path))
        if not stat.S_ISDIR(found.st_mode):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(self.path))
        if found.st_uid != os.geteuid():
            raise PermissionError(errno.EPERM, f"belongs to another user (id {found.st_uid})", str(self.path))
        return found


def _drop_foreign(path: Path, error: ForeignFileError) -> None:
    try:
        path.unlink()
    except FileNotFoundError:
        return
    except OSError:
        raise error from None
    _log.warning("%s: %s; it is deleted", path, error.strerror)


def _delete(path: Path) -> bool:
    with suppress(OSError):
        return files.delete_unlocked(path)
    return False

"""Files that several processes of one user share. Opening never blocks. A file is written entirely or not at all."""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path

from llamaclust.core.cgroups import drop_cached_pages
from llamaclust.core.regular_file import NotRegularError, open_descriptor, take_lock

TEMPORARY = ".tmp"
"""The suffix of files that are being written. A process that is killed may leave such a file."""

_WRITE_BYTES = 1 << 21
"""The size and alignment of writes. Some file systems then use huge pages (ext4 since Linux 6.16)."""

_LOCK_WAIT_S = 10.0

_LOCK_RETRY_S = 0.02

_NOT_A_FILE = (errno.ELOOP, errno.ENXIO, errno.ENODEV, errno.EISDIR)


class ForeignFileError(OSError):
    """The path is a link, a pipe, a directory or another file that is not regular, or another user owns the file."""


class BusyError(OSError):
    """Another process holds the lock."""


class StoppedError(Exception):
    """Another thread stopped the write."""


class Writing:
    def __init__(self) -> None:
        self.is_stopped = False
        self.waits = False  # True while the writer waits for the lock.
        self.unfinished: Path | None = None


def open_own(path: Path, flags: int = os.O_RDONLY) -> FileIO:
    """Opens a file without buffering. Raises FileNotFoundError, ForeignFileError or another OSError."""
    try:
        descriptor = open_descriptor(path, flags | os.O_NOFOLLOW)
    except OSError as error:
        if isinstance(error, NotRegularError) or error.errno in _NOT_A_FILE:
            raise ForeignFileError(errno.EINVAL, "is not a regular file and must be removed", str(path)) from error
        raise
    if (owner := os.fstat(descriptor).st_uid) != os.geteuid():
        os.close(descriptor)
        raise ForeignFileError(errno.EPERM, f"belongs to another user (id {owner}), and must be removed", str(path))
    return FileIO(descriptor, "r" if flags & os.O_ACCMODE == os.O_RDONLY else "r+")


@contextmanager
def locked(path: Path, writing: Writing) -> Iterator[None]:
    """Locks a new or existing file. Raises BusyError after `_LOCK_WAIT_S` s, StoppedError if `writing` is stopped."""
    with open_own(path, os.O_RDWR | os.O_CREAT) as file:
        deadline, writing.waits = time.monotonic() + _LOCK_WAIT_S, True
        while not take_lock(file.fileno()):
            if writing.is_stopped:
                raise StoppedError
            if time.monotonic() >= deadline:
                reason = f"another process has written there for {_LOCK_WAIT_S:g} s; try again later"
                raise BusyError(errno.EAGAIN, reason)
            time.sleep(_LOCK_RETRY_S)
        writing.waits = False
        yield


def write_whole(
    path: Path, parts: Sequence[bytes | memoryview], writing: Writing, modified_ns: int | None, *, is_synced: bool
) -> None:
    """Writes a file entirely or not at all. The caller holds the folder's lock. Raises OSError or StoppedError."""
    made = path.with_name(f"{path.name}{TEMPORARY}")
    try:
        file = open_own(made, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    except FileExistsError:
        raise ForeignFileError(errno.EEXIST, "exists and cannot be replaced; remove it", str(made)) from None
    writing.unfinished = made
    try:
        with file:
            for part in parts:
                for start in range(0, len(part), _WRITE_BYTES):
                    if writing.is_stopped:
                        raise StoppedError
                    _write_all(file.fileno(), memoryview(part)[start : start + _WRITE_BYTES])
            if is_synced:
                os.fsync(file.fileno())
                drop_cached_pages(file.fileno())
            now_ns = time.time_ns()
            os.utime(file.fileno(), ns=(now_ns, modified_ns or now_ns))
        made.rename(path)
    finally:
        remove(made)
        writing.unfinished = None


def _write_all(descriptor: int, data: memoryview) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def used_ns(status: os.stat_result) -> int:
    return max(status.st_atime_ns, status.st_mtime_ns)


def mark_used(descriptor: int) -> os.stat_result:
    """Sets the file's access time to the present time. Returns the file's previous status."""
    found = os.fstat(descriptor)
    with suppress(OSError):
        os.utime(descriptor, ns=(time.time_ns(), found.st_mtime_ns))
    return found


def remove(path: Path) -> None:
    with suppress(OSError):
        path.unlink()


def delete(path: Path) -> int:
    """Deletes a file or an empty directory. Returns the size of a regular file, or else 0. Raises OSError."""
    found = path.lstat()
    if stat.S_ISDIR(found.st_mode):
        path.rmdir()
    else:
        path.unlink()
    return found.st_size if stat.S_ISREG(found.st_mode) else 0


def delete_unlocked(path: Path) -> bool:
    with open_own(path, os.O_RDWR) as file:
        is_free = take_lock(file.fileno())
        if is_free:
            path.unlink()
        return is_free


def reason(error: OSError) -> str:
    if error.strerror is None:
        return str(error)
    return error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"

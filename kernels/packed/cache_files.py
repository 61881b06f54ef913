"""Files of a folder that several processes write: opened without blocking or following links, written whole or not."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

from llamaclust.core.cgroups import drop_cached_pages

_log = logging.getLogger(__name__)

_WRITE_BYTES = 1 << 21
"""One write call, at a multiple of it: some file systems then keep the file in huge pages (ext4 of Linux 6.16)."""

_LOCK_WAIT_S = 10.0
"""How long a writer waits for another one, which has the lock while it writes one image."""

_LOCK_RETRY_S = 0.02

_NOT_A_FILE = (errno.ELOOP, errno.ENXIO, errno.ENODEV, errno.EISDIR)
"""Errors of open for links, sockets, devices without a driver, directories."""


class NotAFileError(OSError):
    """A link, a pipe, a directory or the like instead of a file."""


class BusyError(OSError):
    """Another process has the lock."""


class StoppedError(Exception):
    """A stopped write."""


class Writing:
    """The state of a writer, and the means to stop it."""

    def __init__(self) -> None:
        self.is_stopped = False
        self.waits = False  # for the lock
        self.unfinished: Path | None = None


def open_regular(path: Path, flags: int = os.O_RDONLY) -> FileIO:
    """Unbuffered. FileNotFoundError, NotAFileError, or another OSError with its name."""
    not_a_file = NotAFileError(errno.EINVAL, "is no regular file, and in the way", str(path))
    try:
        descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno not in _NOT_A_FILE:
            raise
        raise not_a_file from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise not_a_file
    return FileIO(descriptor)


@contextmanager
def locked(path: Path, writing: Writing) -> Iterator[None]:
    """BusyError where another process has the lock for long, StoppedError soon after `writing` was stopped."""
    with open_regular(path, os.O_RDWR | os.O_CREAT) as file:
        _lock(file.fileno(), writing)
        yield


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


def write_whole(path: Path, data: memoryview | bytes, writing: Writing) -> None:
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
            drop_cached_pages(file.fileno())
            mark_used(file.fileno())
        made.rename(path)
    finally:
        remove(made)
        writing.unfinished = None


def mark_used(descriptor: int) -> None:
    """Not by the kernel's clock, which is some milliseconds behind the one of `since_ns`."""
    now_ns = time.time_ns()
    os.utime(descriptor, ns=(now_ns, now_ns))


def drop(found: NotAFileError) -> None:
    """Deletes a path that is no regular file. OSError that names it if that fails."""
    try:
        Path(found.filename).unlink()
    except FileNotFoundError:
        return
    except OSError:
        raise found from None
    _log.warning("%s was no regular file; it is deleted", found.filename)


def remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()


def delete(path: Path) -> int:
    """Also an empty directory; its size. OSError with its name."""
    found = path.lstat()
    if stat.S_ISDIR(found.st_mode):
        path.rmdir()
    else:
        path.unlink()
    return found.st_size if stat.S_ISREG(found.st_mode) else 0


def _write_all(descriptor: int, data: memoryview | bytes) -> None:
    done = 0
    while done < len(data):
        done += os.write(descriptor, data[done:])

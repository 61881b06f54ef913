"""Locks a file or a folder between processes. The kernel releases a lock when the process that holds it ends."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llamaclust.core.errors import LlamaclustError, UsageError
from llamaclust.core.regular_file import take_lock, take_lock_within


# The `filelock` package cannot check a lock without taking it, and does not notice when a lock file is deleted.
class FileLock:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor: int | None = None
        # Descriptor of the file whose lock another process held when `take_next` was called last.
        self._awaited: int | None = None

    def take(self) -> bool:
        """Takes the lock. Returns False if another process holds it. Raises UsageError if the path is a folder."""
        return self._has_taken(self._open())

    def take_next(self) -> bool:
        """Takes the lock if its holder has ended, or returns False. Deleting the lock file does not free the lock."""
        if self._awaited is None:
            self._awaited = self._open()
        try:
            if not take_lock(self._awaited):
                return False
        except OSError:  # For example because a file server has lost the file.
            descriptor, self._awaited = self._awaited, None
            os.close(descriptor)
            raise
        descriptor, self._awaited = self._awaited, None
        return self._has_taken(descriptor)

    def _open(self) -> int:
        try:
            return os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except IsADirectoryError as error:
            raise UsageError(f"{self._path} is a folder, but must be a lock file; remove it") from error

    def _has_taken(self, descriptor: int) -> bool:
        try:
            is_taken = take_lock(descriptor) and _is_at(descriptor, self._path)
        except OSError:  # For example from a file server that does not answer or has no locks.
            os.close(descriptor)
            raise
        if not is_taken:
            os.close(descriptor)
            return False
        self.release()
        self._descriptor = descriptor
        return True

    @property
    def is_held(self) -> bool:
        return self._descriptor is not None and _is_at(self._descriptor, self._path)

    def release(self) -> None:
        for descriptor in (self._descriptor, self._awaited):
            if descriptor is not None:
                os.close(descriptor)
        self._descriptor = self._awaited = None


def is_locked(path: Path) -> bool:
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return not take_lock(descriptor, fcntl.LOCK_SH)
    finally:
        os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


@contextmanager
def folder_locked(folder: Path, seconds: float) -> Iterator[None]:
    """Locks a folder against other processes that do the same. Raises LlamaclustError if another process
    holds the lock for `seconds`, and UsageError if the folder cannot be opened."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise UsageError(f"{folder}: {error.strerror}") from error
    try:
        if not take_lock_within(descriptor, seconds):
            raise LlamaclustError(f"{folder}: another process has locked it for {seconds:g} s; try again later")
        yield
    finally:
        os.close(descriptor)

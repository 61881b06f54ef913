"""The journal's file: appended to, emptied or replaced as a whole; never that of a newer coordinator."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from llamaclust.cluster.state.control_record import ControlRecord
from llamaclust.core.errors import SupersededError


class JournalFile:
    """Use from one thread at a time."""

    def __init__(self, path: Path, record: ControlRecord) -> None:
        self.size = 0
        self._path = path
        self._record = record
        self._descriptor: int | None = None

    @property
    def _is_in_place(self) -> bool:
        """Whether the next process finds what was written. The folder may be deleted meanwhile."""
        if self._descriptor is None:
            return False
        with suppress(OSError):
            return os.path.samestat(os.fstat(self._descriptor), self._path.lstat())
        return False

    def append(self, data: bytes, is_synced: bool) -> bool:
        """All of `data` or nothing, after a `rewrite`. False where the file is not in its place: `rewrite` it."""
        if not self._is_in_place:
            return False
        assert self._descriptor is not None
        try:
            _write_all(self._descriptor, data, self.size)
            if is_synced:
                os.fdatasync(self._descriptor)
        except OSError:
            with suppress(OSError):
                os.ftruncate(self._descriptor, self.size)
            raise
        self.size += len(data)
        return True

    def rewrite(self, data: bytes) -> None:
        """The file holds `data` alone, or is as before. SupersededError where it is a newer coordinator's."""
        if not data and self._is_in_place:
            self._empty()
            return
        self._check_owner()
        temporary = self._path.with_name(f".{self._path.name}.new")  # a killed process leaves one at most
        temporary.unlink(missing_ok=True)  # it may be a pipe or a link
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            _write_all(descriptor, data, 0)
            os.fdatasync(descriptor)
            self._check_owner()
            temporary.replace(self._path)
            _sync_folder(self._path.parent)
        except (OSError, SupersededError):
            os.close(descriptor)
            temporary.unlink(missing_ok=True)
            raise
        self.close()
        self._descriptor, self.size = descriptor, len(data)

    def _check_owner(self) -> None:
        if newer := self._record.newer_term():
            raise SupersededError(f"is a newer coordinator's (term {newer}), and not written any more")

    def _empty(self) -> None:
        assert self._descriptor is not None
        if self.size:
            os.ftruncate(self._descriptor, 0)
            self.size = 0

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_all(descriptor: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written

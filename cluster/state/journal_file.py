"""Writes the journal file. Only the newest coordinator may write it."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from llamaclust.cluster.state.control_record import ControlRecord
from llamaclust.cluster.state.journal_records import HEAD_LINE
from llamaclust.core.errors import SupersededError
from llamaclust.core.regular_file import sync_folder


class JournalFile:
    def __init__(self, path: Path, record: ControlRecord) -> None:
        self.path = path
        self.size = 0
        self._record = record
        self._descriptor: int | None = None

    def append(self, data: bytes, is_synced: bool) -> bool:
        """Appends all of `data` or nothing. Returns False if the file is missing or replaced: `rewrite` must follow."""
        descriptor = self._descriptor
        if descriptor is None or not self._is_in_place(descriptor):
            return False
        try:
            size = _write_all(descriptor, data, self.size)
            if is_synced:
                os.fdatasync(descriptor)
        except OSError:
            with suppress(OSError):
                os.ftruncate(descriptor, self.size)
            raise
        self.size = size
        return True

    def rewrite(self, data: bytes) -> None:
        """Replaces the file's content. The content is unchanged if an error is raised. Raises SupersededError if a
        newer coordinator owns the file."""
        if not data and self._descriptor is not None and self._is_in_place(self._descriptor):
            os.ftruncate(self._descriptor, 0)
            self.size = 0
            return
        self._check_owner()
        temporary = self.path.with_name(f".{self.path.name}.new")  # A killed process leaves at most one temporary file.
        temporary.unlink(missing_ok=True)  # Another program may have put a pipe or a link there.
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            size = _write_all(descriptor, data, 0)
            os.fdatasync(descriptor)
            self._check_owner()
            temporary.replace(self.path)
            sync_folder(self.path.parent)
        except (OSError, SupersededError):
            os.close(descriptor)
            temporary.unlink(missing_ok=True)
            raise
        self.close()
        self._descriptor, self.size = descriptor, size

    def _is_in_place(self, descriptor: int) -> bool:
        with suppress(OSError):
            return os.path.samestat(os.fstat(descriptor), self.path.lstat())
        return False

    def _check_owner(self) -> None:
        if newer := self._record.newer_term():
            raise SupersededError(f"a newer coordinator (term {newer}) owns this file; this coordinator stops writing")

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _write_all(descriptor: int, data: bytes, offset: int) -> int:
    view = memoryview(HEAD_LINE + data if data and not offset else data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written
    return offset

"""The journal's file: what it must hold, and how it is appended to, emptied or replaced as a whole; never that of a
newer coordinator."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from llamaclust.cluster.state.control_record import ControlRecord
from llamaclust.cluster.state.journal_records import HEAD_LINE, Admission, Ended, Record, Sent, to_line
from llamaclust.core.errors import SupersededError
from llamaclust.core.regular_file import sync_folder

_SENT_BYTES = 16 << 20
"""Of requests whose replies were sent; the oldest are removed."""


class JournalContents:
    """The lines of requests that have not ended. Each change returns the lines to be written; none if it concerns a
    request that has ended."""

    def __init__(self) -> None:
        self.size_bytes = 0
        self._lines: dict[str, list[bytes]] = {}
        self.sent_ids: dict[str, None] = {}  # requests whose whole replies were sent; the oldest first
        self._sent_bytes = 0

    def __bool__(self) -> bool:
        return bool(self._lines)

    @property
    def data(self) -> bytes:
        return b"".join(line for lines in self._lines.values() for line in lines)

    def add(self, record: Record) -> bytes:
        line = to_line(record)
        if isinstance(record, Admission):
            self._lines[record.id] = []
        elif record.id not in self._lines:
            return b""
        if isinstance(record, Ended):
            self._remove(record.id)
        else:
            self._lines[record.id].append(line)
            self._count(record.id, len(line))
        return line

    def sent(self, request_id: str) -> bytes:
        """The oldest of these end if they are many."""
        if request_id in self.sent_ids or not (lines := self.add(Sent(request_id))):
            return b""
        self.sent_ids[request_id] = None
        self._sent_bytes += sum(map(len, self._lines[request_id]))
        while self._sent_bytes > _SENT_BYTES:
            lines += self.add(Ended(next(iter(self.sent_ids))))
        return lines

    def _remove(self, request_id: str) -> None:
        self._count(request_id, -sum(map(len, self._lines.pop(request_id))))
        self.sent_ids.pop(request_id, None)

    def _count(self, request_id: str, more_bytes: int) -> None:
        self.size_bytes += more_bytes
        if request_id in self.sent_ids:
            self._sent_bytes += more_bytes


class JournalFile:
    """Use from one thread at a time."""

    def __init__(self, path: Path, record: ControlRecord) -> None:
        self.path = path
        self.size = 0
        self._record = record
        self._descriptor: int | None = None

    def append(self, data: bytes, is_synced: bool) -> bool:
        """Writes all of `data` or nothing, after a `rewrite`. False if the file is not in its place: `rewrite` it."""
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
        """The file holds `data` alone, or is as before. SupersededError where it is a newer coordinator's."""
        if not data and self._descriptor is not None and self._is_in_place(self._descriptor):
            os.ftruncate(self._descriptor, 0)
            self.size = 0
            return
        self._check_owner()
        temporary = self.path.with_name(f".{self.path.name}.new")  # a killed process leaves one at most
        temporary.unlink(missing_ok=True)  # it may be a pipe or a link
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
        """True if the next process finds what was written. The folder may be deleted meanwhile."""
        with suppress(OSError):
            return os.path.samestat(os.fstat(descriptor), self.path.lstat())
        return False

    def _check_owner(self) -> None:
        if newer := self._record.newer_term():
            raise SupersededError(f"is a newer coordinator's (term {newer}), and not written any more")

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _write_all(descriptor: int, data: bytes, offset: int) -> int:
    """Returns the size of the file then; its first line is its version."""
    view = memoryview(HEAD_LINE + data if data and not offset else data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written
    return offset

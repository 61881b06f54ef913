"""The journal of admitted requests, from which a restarted coordinator answers them again, bit for bit: an answer is a
function of prompt, parameters and seed. Recorded tokens only save computation. Sent replies are kept for a while,
because their clients may not have read them. The file is emptied when no request needs it, and rewritten when most of
it belongs to ended requests."""

from __future__ import annotations

import asyncio
import logging
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from llamaclust.cluster.state.control_record import ControlRecord
from llamaclust.cluster.state.disk_thread import DiskThread
from llamaclust.cluster.state.journal_records import (
    HEAD_LINE,
    Change,
    ChoiceKey,
    Record,
    RequestContext,
    to_line,
)
from llamaclust.core.errors import SupersededError
from llamaclust.core.regular_file import sync_folder
from llamaclust.core.sampling import RowResult

_PAUSE_S = 0.02
"""The shortest time between the starts of two writes. It is shorter than a prompt takes. Admissions share a write."""
_LATER_S = 0.1
"""The delay of lines that need not be on disk soon. A write for an admission includes them earlier."""
_RETRY_S = 5.0
_ENDED_BYTES = 4 << 20
_SENT_BYTES = 16 << 20
"""The most bytes of requests whose replies were sent. The oldest of these requests are removed first."""

_log = logging.getLogger(__name__)


class Journal:
    def __init__(self, path: Path, record: ControlRecord, sent_s: float) -> None:
        """Sent replies are kept for `sent_s`. The newest coordinator owns the file, by the terms in `record`."""
        self._sent_s = sent_s
        self._contents = _Contents()
        self._writer = _Writer(JournalFile(path, record), self._contents)
        self._without_progress: dict[str, int] = {}  # restored requests, and how many times they have been begun so

    async def restore(self, requests: Iterable[RequestContext]) -> None:
        """Begins with the open requests of an earlier coordinator. Removes all other content of the file."""
        for request in requests:
            for record in request.records():
                self._contents.add(record)
            if request.is_complete:
                self.completed(request.id, request.limit_s)
            elif request.is_sent:
                self.sent(request.id)
        await self._writer.written(b"", is_synced=True)

    def admit(self, request: RequestContext) -> asyncio.Future[None]:
        """Records a request. The future ends once it is on disk or failed. Raises SupersededError after `seal`."""
        if self._writer.is_sealed:
            raise SupersededError("this coordinator takes no requests any more; try again")
        return self._writer.written(self._contents.add(request), is_synced=True)

    def answer(self, request_id: str, choice: ChoiceKey, start: int, rows: Sequence[RowResult]) -> None:
        """Records tokens of a choice, beginning with token number `start`. They are written soon, but not synced."""
        self._add(Change.answered(request_id, choice, start, rows))

    async def begin_restored(self, times: Mapping[str, int]) -> None:
        """Records how often requests restarted without a new token. Returns once the counts are in the file."""
        if not self._writer.is_sealed:
            self._without_progress.update(times)
            lines = b"".join(self._contents.add(Change(name, restores=count)) for name, count in times.items())
            await self._writer.written(lines, is_synced=False)

    def progressed(self, request_id: str) -> None:
        self._without_progress.pop(request_id, None)
        self._add(Change(request_id, restores=0))

    def sent(self, request_id: str) -> None:
        """Keeps a request for a while after its whole reply was sent; of many, the oldest are removed earlier."""
        if not self._writer.is_sealed and (lines := self._contents.sent(request_id)):
            self._writer.add(lines)
            asyncio.get_running_loop().call_later(self._sent_s, self.end, request_id)

    def completed(self, request_id: str, limit_s: float) -> None:
        """Marks a background reply as computed. Until `limit_s` after admission, it is computed again on request."""
        self._add(Change(request_id, is_sent=True, limit_s=limit_s))

    def end(self, request_id: str) -> None:
        self._add(Change(request_id, is_ended=True))

    def end_sent(self) -> None:
        for request_id in tuple(self._contents.sent_ids):
            self._add(Change(request_id, is_ended=True))

    def stop_in_order(self) -> None:
        """Takes back one counted restart of each request without progress, since an orderly stop is not its failure."""
        for request_id, times in self._without_progress.items():
            self._add(Change(request_id, restores=times - 1))
        self._without_progress.clear()

    def seal(self) -> None:
        self._writer.is_sealed = True

    def _add(self, record: Record) -> None:
        if not self._writer.is_sealed:
            self._writer.add(self._contents.add(record))

    async def aclose(self) -> None:
        """Writes pending lines. Ends requests with sent replies, unless the journal is sealed."""
        self.end_sent()
        await self._writer.aclose()


class _Contents:
    def __init__(self) -> None:
        self.lines: dict[str, bytearray] = {}  # by request
        self.size_bytes = 0
        self.sent_ids: dict[str, None] = {}  # requests whose whole replies were sent; the oldest first
        self._sent_bytes = 0

    @property
    def data(self) -> bytes:
        return b"".join(self.lines.values())

    def add(self, record: Record) -> bytes:
        if isinstance(record, RequestContext):
            line = to_line(record)
            self.lines[record.id] = bytearray()
        elif record.id in self.lines:
            line = to_line(record)
        else:
            return b""
        if isinstance(record, Change) and record.is_ended:
            self._count(record.id, -len(self.lines.pop(record.id)))
            self.sent_ids.pop(record.id, None)
        else:
            self.lines[record.id] += line
            self._count(record.id, len(line))
        return line

    def sent(self, request_id: str) -> bytes:
        if request_id in self.sent_ids or not (lines := self.add(Change(request_id, is_sent=True))):
            return b""
        self.sent_ids[request_id] = None
        self._sent_bytes += len(self.lines[request_id])
        while self._sent_bytes > _SENT_BYTES:
            lines += self.add(Change(next(iter(self.sent_ids)), is_ended=True))
        return lines

    def _count(self, request_id: str, more_bytes: int) -> None:
        self.size_bytes += more_bytes
        if request_id in self.sent_ids:
            self._sent_bytes += more_bytes


class _Writer:
    def __init__(self, file: JournalFile, contents: _Contents) -> None:
        self.is_sealed = False
        self._file = file
        self._contents = contents
        self._thread = DiskThread("journal")
        self._pending: list[bytes] = []
        self._waiting: list[asyncio.Future[None]] = []
        self._is_sync_due = False
        self._due: asyncio.TimerHandle | None = None  # of the next write
        self._writing: asyncio.Task[None] | None = None
        self._begun_s = -math.inf  # the last write
        self._failed_s: float | None = None  # when writing failed last; None: the last attempt did not fail

    def add(self, lines: bytes) -> None:
        if lines:
            self._pending.append(lines)
            self._write_at(asyncio.get_running_loop().time() + _LATER_S)

    def written(self, lines: bytes, *, is_synced: bool) -> asyncio.Future[None]:
        """Adds lines. The future ends when all so far are in the file (`is_synced`: on disk) or cannot be written."""
        loop = asyncio.get_running_loop()
        self._pending.append(lines)
        self._waiting.append(written := loop.create_future())
        self._is_sync_due |= is_synced
        self._write_at(loop.time())
        return written

    async def aclose(self) -> None:
        while self._writing is not None or self._pending:
            if self._writing is None:
                self._write()
            assert self._writing is not None
            await self._writing
        if self._due is not None:
            self._due.cancel()
        if not self._thread.hangs:
            self._file.close()

    def _write_at(self, due_s: float) -> None:
        if self._writing is not None:
            return
        due_s = max(due_s, self._begun_s + _PAUSE_S)
        if self._due is not None:
            if self._due.when() <= due_s:
                return
            self._due.cancel()
        self._due = asyncio.get_running_loop().call_at(due_s, self._write)

    def _write(self) -> None:
        if self._due is not None:
            self._due.cancel()
            self._due = None
        self._writing = asyncio.create_task(self._write_pending())

    async def _write_pending(self) -> None:
        self._begun_s = asyncio.get_running_loop().time()
        pending, self._pending = self._pending, []
        waiting, self._waiting = self._waiting, []
        is_synced, self._is_sync_due = self._is_sync_due, False
        try:
            if self._failed_s is None or self._begun_s - self._failed_s >= _RETRY_S:
                await self._try(b"".join(pending), is_synced=is_synced)
        finally:
            for written in waiting:
                if not written.done():
                    written.set_result(None)
            self._writing = None
            if self._waiting or self._pending:
                self._write_at(self._begun_s + (_PAUSE_S if self._waiting else _LATER_S))
            elif self._failed_s is not None and not self.is_sealed:  # the file lacks open requests, and none may come
                self._write_at(self._failed_s + _RETRY_S)

    async def _try(self, data: bytes, *, is_synced: bool) -> None:
        path, has_failed = self._file.path, self._failed_s is not None
        try:
            await self._put(data, is_synced=is_synced)
        except SupersededError as error:
            if not self.is_sealed:
                _log.error("%s: %s", path, error)
            self.is_sealed = True
        except Exception as error:  # noqa: BLE001  requests are served, whatever the cause
            self._failed_s = asyncio.get_running_loop().time()
            if not has_failed:
                why = error.strerror if isinstance(error, OSError) else repr(error)
                lost = "requests are served, but would not survive the coordinator until it can be written again"
                _log.warning("%s: cannot be written: %s; %s", path, why, lost)
        else:
            self._failed_s = None
            if has_failed:
                _log.warning("%s: can be written again", path)

    async def _put(self, data: bytes, *, is_synced: bool) -> None:
        size = self._file.size + len(data)
        is_mostly_ended = not self._contents.lines or size > 2 * self._contents.size_bytes + _ENDED_BYTES
        if self._failed_s is None and not is_mostly_ended:
            if await self._thread.call(partial(self._file.append, data, is_synced)):
                return
            self._pending.clear()  # what came meanwhile is in the contents
        await self._thread.call(partial(self._file.rewrite, self._contents.data))


class JournalFile:
    def __init__(self, path: Path, record: ControlRecord) -> None:
        self.path = path
        self.size = 0
        self._record = record
        self._descriptor: int | None = None

    def append(self, data: bytes, is_synced: bool) -> bool:
        """Appends all of `data` or nothing. Returns False if the file is gone or replaced; then `rewrite` is due."""
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
        """Replaces the content, or nothing on an error. Raises SupersededError if a newer coordinator owns the file."""
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
        with suppress(OSError):
            return os.path.samestat(os.fstat(descriptor), self.path.lstat())
        return False

    def _check_owner(self) -> None:
        if newer := self._record.newer_term():
            raise SupersededError(f"belongs to a newer coordinator (term {newer}); this one no longer writes it")

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

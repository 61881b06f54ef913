"""Journals admitted requests, so that a restarted coordinator can compute the same answers bit for bit. Prompt,
parameters and seed determine an answer; recorded tokens only save computation. A request is kept for some time after
its reply was sent, because the client may not have received all of it."""

from __future__ import annotations

import asyncio
import logging
import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TypeAlias

from llamaclust.cluster.state.control_record import ControlRecord
from llamaclust.cluster.state.disk_thread import DiskThread
from llamaclust.cluster.state.journal_file import JournalFile
from llamaclust.cluster.state.journal_records import (
    Change,
    ChoiceKey,
    Record,
    RequestContext,
    to_line,
)
from llamaclust.core.errors import SupersededError
from llamaclust.core.sampler.results import RowResult

_PAUSE_S = 0.02
"""Minimum time between the starts of two writes. All admissions within this time share one write."""
_LATER_S = 0.1
"""Maximum delay in seconds before lines other than admissions are written."""
_RETRY_S = 5.0
_ENDED_BYTES = 4 << 20
_SENT_BYTES = 16 << 20
"""Maximum total size of requests whose replies were sent. Above it, the oldest of these requests are removed."""

_LONG_BYTES = 1 << 16
"""A thread encodes requests whose body has at least this number of bytes."""

_Step: TypeAlias = "Callable[[], asyncio.Future[bytes] | None]"
"""A change of the journal's contents. If it returns a future, the next change waits until the future is done."""

_log = logging.getLogger(__name__)


class Journal:
    def __init__(self, path: Path, record: ControlRecord, sent_s: float) -> None:
        """Opens a journal that keeps a request for `sent_s` seconds after its reply was sent. `record` tells whether a
        newer coordinator owns the file."""
        self._sent_s = sent_s
        self._contents = _Contents()
        self._writer = _Writer(JournalFile(path, record), self._contents)
        self._steps = _Steps()
        self._making = ThreadPoolExecutor(1, "journal-lines")
        self._without_progress: dict[str, int] = {}  # Number of restarts since the last new token, by request id.
        self._ends: dict[str, asyncio.TimerHandle] = {}  # Timers that remove requests whose replies were sent.

    async def restore(self, requests: Sequence[RequestContext]) -> None:
        """Replaces the file's content with the open requests of an earlier coordinator."""
        made = [[(each, await self._made(each)) for each in request.records()] for request in requests]
        # No write may happen inside this loop, because it would lose requests that are not added yet.
        for request, records in zip(requests, made, strict=True):
            for record, line in records:
                self._contents.add(record, line)
            if request.is_complete:
                self.completed(request.id, request.limit_s)
            elif request.is_sent:
                self.sent(request.id)
        on_disk: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._writer.write(b"", on_disk, is_synced=True)
        await on_disk

    def admit(self, request: RequestContext) -> asyncio.Future[None]:
        """Records a request. The returned future is done when the record is on disk or cannot be written. It fails
        with RequestError if the record is too long. After `seal`, `admit` itself raises SupersededError."""
        if self._writer.is_sealed:
            raise SupersededError("this coordinator has stopped serving; try again later")
        on_disk: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._steps.take(partial(self._make, request, on_disk))
        return on_disk

    def answer(self, request_id: str, choice: ChoiceKey, start: int, rows: Sequence[RowResult]) -> None:
        """Records tokens of an answer, beginning with token number `start`. They are written soon, without fsync."""
        self._add(Change.answered(request_id, choice, start, rows))

    async def begin_restored(self, times: Mapping[str, int]) -> None:
        """Records how often each request was restarted since its last new token. Returns when the file is written."""
        if not self._writer.is_sealed:
            self._without_progress.update(times)
            in_file: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            changes = [Change(name, restores=count, is_begun=True) for name, count in times.items()]
            self._steps.take(partial(self._enter, changes, in_file))
            await in_file

    def progressed(self, request_id: str) -> None:
        self._without_progress.pop(request_id, None)
        self._add(Change(request_id, restores=0))

    def sent(self, request_id: str) -> None:
        """Marks a request whose whole reply was sent. The request is kept for some time if there is space."""
        if not self._writer.is_sealed:
            self._steps.take(partial(self._enter_sent, request_id))

    def completed(self, request_id: str, limit_s: float) -> None:
        """Marks a background reply as computed. A restarted coordinator can compute the reply again for the client,
        until `limit_s` seconds after admission."""
        self._add(Change(request_id, is_sent=True, limit_s=limit_s))

    def end(self, request_id: str) -> None:
        self._add(Change(request_id, is_ended=True))

    def end_sent(self) -> None:
        if not self._writer.is_sealed:
            self._steps.take(self._end_sent)

    def stop_in_order(self) -> None:
        """Subtracts 1 from the counts that `begin_restored` recorded, because an orderly stop is no failed attempt."""
        for request_id, times in self._without_progress.items():
            self._add(Change(request_id, restores=times - 1))
        self._without_progress.clear()

    def seal(self) -> None:
        self._writer.is_sealed = True

    async def aclose(self) -> None:
        """Writes pending lines. Removes requests whose replies were sent, unless the journal is sealed."""
        self.end_sent()
        await self._steps.wait_done()
        self._making.shutdown(wait=False)
        await self._writer.aclose()

    def _add(self, change: Change) -> None:
        if not self._writer.is_sealed:
            self._steps.take(partial(self._enter, [change]))

    # -- steps ---------------------------------------------------------------------------------------------------------

    def _make(self, request: RequestContext, on_disk: asyncio.Future[None]) -> asyncio.Future[bytes] | None:
        if len(request.body) < _LONG_BYTES and not (request.images or request.earlier):
            self._admit(request, on_disk, partial(to_line, request))
            return None
        made = self._made(request)
        made.add_done_callback(lambda made: self._admit(request, on_disk, made.result))
        return made

    def _admit(self, request: RequestContext, on_disk: asyncio.Future[None], made: Callable[[], bytes]) -> None:
        try:
            line = made()
        except Exception as error:  # noqa: BLE001  the request fails
            if not on_disk.done():
                on_disk.set_exception(error)
        else:
            self._writer.write(self._contents.add(request, line), on_disk, is_synced=True)

    def _made(self, record: Record) -> asyncio.Future[bytes]:
        return asyncio.get_running_loop().run_in_executor(self._making, to_line, record)

    def _enter(self, changes: Iterable[Change], in_file: asyncio.Future[None] | None = None) -> None:
        changes = tuple(changes)
        for change in changes:
            if (change.is_begun or change.is_ended) and (timer := self._ends.pop(change.id, None)) is not None:
                timer.cancel()
        lines = b"".join(map(self._contents.add, changes))
        if in_file is None:
            self._writer.add(lines)
        else:
            self._writer.write(lines, in_file, is_synced=False)

    def _enter_sent(self, request_id: str) -> None:
        if lines := self._contents.sent(request_id):
            self._writer.add(lines)
            loop = asyncio.get_running_loop()
            self._ends[request_id] = loop.call_later(self._sent_s, self.end, request_id)

    def _end_sent(self) -> None:
        self._enter(Change(request_id, is_ended=True) for request_id in tuple(self._contents.sent_ids))


class _Steps:
    """Changes the journal's contents in the order of calls. While a thread encodes a long line, later changes wait."""

    def __init__(self) -> None:
        self._waiting: deque[_Step] = deque()
        self._running: asyncio.Future[bytes] | None = None

    def take(self, step: _Step) -> None:
        self._waiting.append(step)
        self._go_on()

    async def wait_done(self) -> None:
        while self._running is not None:
            await asyncio.wait([self._running])

    def _go_on(self) -> None:
        while self._waiting and self._running is None:
            self._running = self._waiting.popleft()()
            if self._running is not None:
                self._running.add_done_callback(self._made)

    def _made(self, _: asyncio.Future[bytes]) -> None:
        self._running = None
        self._go_on()


class _Contents:
    def __init__(self) -> None:
        self.lines: dict[str, bytearray] = {}  # Lines by request id.
        self.size_bytes = 0
        self.sent_ids: dict[str, None] = {}  # Requests whose whole replies were sent, beginning with the oldest.
        self._sent_bytes = 0

    @property
    def data(self) -> bytes:
        return b"".join(self.lines.values())

    def add(self, record: Record, line: bytes = b"") -> bytes:
        """Adds a record and returns its line. Returns an empty line if the record's request has already ended."""
        if isinstance(record, RequestContext):
            self.lines[record.id] = bytearray()
        elif record.id not in self.lines:
            return b""
        line = line or to_line(record)
        if isinstance(record, Change) and record.is_begun and record.id in self.sent_ids:
            del self.sent_ids[record.id]
            self._sent_bytes -= len(self.lines[record.id])
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
        self._due: asyncio.TimerHandle | None = None  # Timer of the next write.
        self._writing: asyncio.Task[None] | None = None
        self._begun_s = -math.inf  # Start of the last write.
        self._failed_s: float | None = None  # Time of the last failed write. None if the last write succeeded.

    def add(self, lines: bytes) -> None:
        if lines:
            self._pending.append(lines)
            self._write_at(asyncio.get_running_loop().time() + _LATER_S)

    def write(self, lines: bytes, written: asyncio.Future[None], *, is_synced: bool) -> None:
        """Queues lines to write at once. The future `written` is done when they are written or writing has failed."""
        self._pending.append(lines)
        self._waiting.append(written)
        self._is_sync_due |= is_synced
        self._write_at(asyncio.get_running_loop().time())

    async def aclose(self) -> None:
        while self._writing is not None or self._pending or self._waiting:
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
            elif self._failed_s is not None and not self.is_sealed:
                # Writing is tried again even if no new lines come, because the file lacks open requests.
                self._write_at(self._failed_s + _RETRY_S)

    async def _try(self, data: bytes, *, is_synced: bool) -> None:
        path, has_failed = self._file.path, self._failed_s is not None
        try:
            await self._put(data, is_synced=is_synced)
        except SupersededError as error:
            if not self.is_sealed:
                _log.error("%s: %s", path, error)
            self.is_sealed = True
        except Exception as error:  # noqa: BLE001  requests are served in any case
            self._failed_s = asyncio.get_running_loop().time()
            if not has_failed:
                why = error.strerror if isinstance(error, OSError) else repr(error)
                lost = "requests are served, but are lost if the coordinator ends before the file can be written again"
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
            self._pending.clear()  # The contents include all pending lines.
        await self._thread.call(partial(self._file.rewrite, self._contents.data))

"""The journal of admitted requests: what a restarted coordinator needs to answer them again, bit for bit.

One file of lines, each with its CRC-32. An answer is a function of prompt, parameters and seed, so an admission holds a
request's body and seed; answered tokens only spare computing them one by one. A reply that was sent is kept for a
while: its client may not have read it. A torn or damaged line is skipped, and with it the tokens that follow its own.
The file is emptied whenever it needs no request, and rewritten with those that it needs where most of it is of others.
"""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import math
import os
import stat
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from llamaclust.cluster.state.control_record import ControlRecord
from llamaclust.cluster.state.disk_thread import DiskThread
from llamaclust.cluster.state.journal_file import JournalFile
from llamaclust.core.errors import SupersededError
from llamaclust.core.sampling import RowResult

_RETRY_S = 5.0
"""Between two attempts to write to a disk that is full, read-only or away."""
_WRITE_S = 10.0
"""Until a disk is taken for one that hangs: as long as one request at most waits for it."""
_ENDED_BYTES = 4 << 20
"""Of ended requests, and as much again as of open ones, before the file is rewritten."""

_SENT_BYTES = 16 << 20
"""Of requests whose replies were sent; the oldest give way."""
_MAX_LINE_BYTES = 64 << 20
"""More than the largest body needs as JSON; of a longer line, which is none of ours, no more is held."""
_CHECKSUM_DIGITS = 8

_log = logging.getLogger(__name__)

ChoiceKey = tuple[int, int]
"""Prompt and choice of a request."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Admission:
    """A request as it was accepted."""

    id: str
    endpoint: str  # path of the POST
    body: str
    seed: int  # where the body has none
    created: int  # Unix time in seconds, part of replies
    deadline: float  # Unix time at which it ends unanswered
    served: str = ""  # digest of what else answers depend on: the model and its settings
    owner: str = ""  # digest of the API key; "": no key was needed
    conversation: str = ""  # the client's names of the reply
    idempotency_key: str = ""
    is_streamed: bool = True


@dataclass(frozen=True, slots=True)
class OpenRequest:
    """A request of the journal that has not ended, and the tokens of its choices so far."""

    admission: Admission
    answered: Mapping[ChoiceKey, tuple[RowResult, ...]] = field(default_factory=dict)
    is_sent: bool = False  # the whole reply was; its client may not have read it


@dataclass(slots=True)
class _Lines:
    """Of a request that has not ended."""

    parts: list[bytes]
    recorded: Counter[ChoiceKey] = field(default_factory=Counter)  # tokens

    @property
    def size_bytes(self) -> int:
        return sum(map(len, self.parts))


class _Needed:
    """The lines of requests that have not ended; each call gives those to be written."""

    def __init__(self) -> None:
        self.size_bytes = 0
        self._requests: dict[str, _Lines] = {}
        self._sent: dict[str, float] = {}  # when their whole replies had been sent; the oldest first
        self._sent_bytes = 0

    def __bool__(self) -> bool:
        return bool(self._requests)

    @property
    def data(self) -> bytes:
        return b"".join(line for lines in self._requests.values() for line in lines.parts)

    @property
    def oldest_sent_s(self) -> float | None:
        return next(iter(self._sent.values()), None)

    def admit(self, admission: Admission) -> bytes:
        line = _line({"admit": asdict(admission)})
        self._requests[admission.id] = _Lines([line])
        self.size_bytes += len(line)
        return line

    def answer(self, request_id: str, choice: ChoiceKey, rows: Sequence[RowResult]) -> bytes:
        """Tokens that follow those of earlier calls."""
        if (lines := self._requests.get(request_id)) is None:
            return b""
        pairs = [(row.token, row.logprob) for row in rows]
        line = _line({"answer": request_id, "choice": choice, "after": lines.recorded[choice], "rows": pairs})
        lines.recorded[choice] += len(rows)
        lines.parts.append(line)
        self.size_bytes += len(line)
        return line

    def sent(self, request_id: str, now_s: float) -> bytes:
        """The oldest of these end where they are many."""
        lines = self._requests.get(request_id)
        if lines is None or request_id in self._sent:
            return b""
        line = _line({"sent": request_id})
        lines.parts.append(line)
        self._sent[request_id] = now_s
        self.size_bytes += len(line)
        self._sent_bytes += lines.size_bytes
        written = [line]
        while self._sent_bytes > _SENT_BYTES:
            written.append(self.end(next(iter(self._sent))))
        return b"".join(written)

    def end(self, request_id: str) -> bytes:
        lines = self._requests.pop(request_id, None)
        if lines is None:
            return b""
        self.size_bytes -= lines.size_bytes
        if self._sent.pop(request_id, None) is not None:
            self._sent_bytes -= lines.size_bytes
        return _line({"end": request_id})

    def end_sent(self, until_s: float) -> bytes:
        """Those that were sent until then."""
        return b"".join([self.end(request_id) for request_id, sent_s in list(self._sent.items()) if sent_s <= until_s])


class Journal:
    """The open journal of one coordinator. Use from one event loop; `aclose` it.

    Disk errors do not reach requests: while nothing can be written, requests are served without a record.
    """

    def __init__(self, path: Path, record: ControlRecord, sent_s: float) -> None:
        """`sent_s`: how long requests are kept whose replies were sent. `record` is the coordinator's: once a newer one
        has begun, the file is that one's."""
        self._path = path
        self._file = JournalFile(path, record)
        self._sent_s = sent_s
        self._needed = _Needed()
        self._pending: list[bytes] = []
        self._waiting: list[asyncio.Future[None]] = []
        self._writing: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None  # of those that were sent
        self._is_sealed = False
        self._is_whole = False  # the file has the lines of all open requests
        self._failed_s: float | None = None  # when writing failed last; None: the last attempt did not fail
        self._thread = DiskThread("journal", _WRITE_S)

    async def restore(self, requests: Iterable[OpenRequest]) -> None:
        """Begins with the open requests of an earlier coordinator; what else the file holds is removed."""
        for request in requests:
            self._needed.admit(request.admission)
            for choice, rows in request.answered.items():
                self._needed.answer(request.admission.id, choice, rows)
            if request.is_sent:
                self.sent(request.admission.id)
        await self._written()

    async def admit(self, admission: Admission) -> None:
        """Returns once the record is on disk, or cannot be. Admissions at the same time share one fsync.
        SupersededError where the journal is sealed."""
        if self._is_sealed:
            raise SupersededError("this coordinator takes no requests any more; try again")
        self._pending.append(self._needed.admit(admission))
        await self._written()

    def answer(self, request_id: str, choice: ChoiceKey, rows: Sequence[RowResult]) -> None:
        """Tokens of a choice that follow those of earlier calls; written soon, and not synced."""
        if not self._is_sealed:
            self._add(self._needed.answer(request_id, choice, rows))

    def sent(self, request_id: str) -> None:
        """Its whole reply was sent: it ends in a while, the oldest earlier where these are many."""
        if not self._is_sealed:
            self._add(self._needed.sent(request_id, asyncio.get_running_loop().time()))
            self._await_oldest()

    def end(self, request_id: str) -> None:
        """The request needs no record any more."""
        if not self._is_sealed:
            self._add(self._needed.end(request_id))

    def end_sent(self) -> None:
        """All whose replies were sent: clients that come back later are too late."""
        if not self._is_sealed:
            self._add(self._needed.end_sent(math.inf))

    def seal(self) -> None:
        """What is open is left to the next coordinator: from now on nothing is recorded."""
        self._is_sealed = True

    def _add(self, line: bytes) -> None:
        if line:
            self._pending.append(line)
            self._write_soon()

    def _await_oldest(self) -> None:
        if self._timer is None and (sent_s := self._needed.oldest_sent_s) is not None:
            self._timer = asyncio.get_running_loop().call_at(sent_s + self._sent_s, self._end_sent)

    def _end_sent(self) -> None:
        """Those that were kept for long enough."""
        self._timer = None
        if not self._is_sealed:
            self._add(self._needed.end_sent(asyncio.get_running_loop().time() - self._sent_s))
            self._await_oldest()

    async def aclose(self) -> None:
        """Writes what is left. Unless it is sealed, clients that come back later are too late."""
        if self._timer is not None:
            self._timer.cancel()
        self.end_sent()
        if self._writing is not None:
            await self._writing
        self._thread.close()
        if not self._thread.hangs:
            self._file.close()

    async def _written(self) -> None:
        written = asyncio.get_running_loop().create_future()
        self._waiting.append(written)
        self._write_soon()
        await written

    def _write_soon(self) -> None:
        if self._writing is None:
            self._writing = asyncio.create_task(self._write())

    async def _write(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while self._pending or self._waiting:
                pending, self._pending = self._pending, []
                waiting, self._waiting = self._waiting, []
                try:
                    if self._failed_s is None or loop.time() - self._failed_s >= _RETRY_S:
                        await self._try(pending, is_synced=bool(waiting))
                finally:
                    for written in waiting:
                        if not written.done():
                            written.set_result(None)
        finally:
            self._writing = None

    async def _try(self, pending: list[bytes], *, is_synced: bool) -> None:
        try:
            await self._put(b"".join(pending), is_synced=is_synced)
        except SupersededError as error:
            if not self._is_sealed:
                _log.error("%s: %s", self._path, error)
            self.seal()
        except Exception as error:  # noqa: BLE001  requests are served, whatever the cause
            if self._failed_s is None:
                _log.warning(
                    "%s: cannot be written: %s; requests are served, but would not survive the coordinator until "
                    "it can be written again",
                    self._path,
                    error.strerror if isinstance(error, OSError) else repr(error),
                )
            self._is_whole, self._failed_s = False, asyncio.get_running_loop().time()
        else:
            if self._failed_s is not None:
                _log.warning("%s: can be written again", self._path)
            self._is_whole, self._failed_s = True, None

    async def _put(self, data: bytes, *, is_synced: bool) -> None:
        """Nothing of the file is touched outside of the thread."""
        if self._is_whole and not self._is_mostly_ended(len(data)):
            if await self._thread.call(partial(self._file.append, data, is_synced)):
                return
            self._pending.clear()  # what came meanwhile is among what is needed
        await self._thread.call(partial(self._file.rewrite, self._needed.data))

    def _is_mostly_ended(self, more_bytes: int) -> bool:
        size = self._file.size + more_bytes
        return not self._needed or size > 2 * self._needed.size_bytes + _ENDED_BYTES


def _line(record: Mapping[str, Any]) -> bytes:
    text = json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")
    return b"%08x %s\n" % (zlib.crc32(text), text)


def read_journal(path: Path, now: float, served: str = "") -> list[OpenRequest]:
    """The requests that an earlier coordinator left, of the same `served` digest and with deadlines after `now` (Unix
    time), in the order of their admission; empty where there is no journal. OSError where it cannot be read."""
    admissions: dict[str, Admission] = {}
    answered: dict[str, dict[ChoiceKey, list[RowResult]]] = {}
    sent = set()
    for record in _records(path):
        match record:
            case {"admit": fields}:
                admissions[fields["id"]] = Admission(**fields)
                answered[fields["id"]] = {}
            case {"answer": request_id, "choice": [prompt, choice], "after": start, "rows": rows} if (
                request_id in answered
            ):
                known = answered[request_id].setdefault((prompt, choice), [])
                if start == len(known):
                    known.extend(RowResult(token, logprob) for token, logprob in rows)
            case {"sent": request_id}:
                sent.add(request_id)
            case {"end": request_id}:
                admissions.pop(request_id, None)
    return [
        OpenRequest(
            admission,
            {choice: tuple(rows) for choice, rows in answered[admission.id].items()},
            admission.id in sent,
        )
        for admission in admissions.values()
        if admission.deadline > now and admission.served == served
    ]


def _records(path: Path) -> Iterable[dict[str, Any]]:
    """What is on whole lines."""
    try:
        file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    except FileNotFoundError:
        return
    with file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
        while line := file.readline(_MAX_LINE_BYTES):
            checksum, text = line[:_CHECKSUM_DIGITS], line[_CHECKSUM_DIGITS + 1 :].rstrip(b"\n")
            with suppress(ValueError):
                if int(checksum, 16) == zlib.crc32(text):
                    yield json.loads(text.decode("utf-8", "surrogatepass"))

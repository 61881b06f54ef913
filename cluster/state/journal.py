"""The journal of admitted requests: what a restarted coordinator needs to answer them again, bit for bit.

One file of lines, each with its CRC-32. An answer is a function of prompt, parameters and seed, so an admission holds a
request's body and seed; answered tokens only spare computing them one by one. A torn or damaged line is skipped, and
with it the tokens that follow its own. The file is emptied whenever no request is open, and rewritten with the open
ones where most of it is of others.
"""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import os
import stat
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from llamaclust.core.sampling import RowResult

_RETRY_S = 5.0
"""Between two attempts to write to a disk that is full or read-only."""
_ENDED_BYTES = 4 << 20
"""Of ended requests, and as much again as of open ones, before the file is rewritten."""

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


@dataclass(slots=True)
class _Lines:
    """Of a request that has not ended."""

    parts: list[bytes]
    recorded: Counter[ChoiceKey] = field(default_factory=Counter)  # tokens

    def answer(self, request_id: str, choice: ChoiceKey, rows: Sequence[RowResult]) -> bytes:
        """The line of tokens that follow those of earlier calls."""
        pairs = [(row.token, row.logprob) for row in rows]
        line = _line({"answer": request_id, "choice": choice, "after": self.recorded[choice], "rows": pairs})
        self.recorded[choice] += len(rows)
        self.parts.append(line)
        return line


class Journal:
    """The open journal of one coordinator. Use from one event loop; `aclose` it.

    Disk errors do not reach requests: while nothing can be written, requests are served without a record.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = _File(path)
        self._open: dict[str, _Lines] = {}
        self._open_bytes = 0
        self._pending: list[bytes] = []
        self._waiting: list[asyncio.Future[None]] = []
        self._writing: asyncio.Task[None] | None = None
        self._is_whole = False  # the file has the lines of all open requests
        self._failed_s: float | None = None  # when writing failed last; None: the last attempt did not fail
        self._thread = ThreadPoolExecutor(1, "journal")

    async def restore(self, requests: Iterable[OpenRequest]) -> None:
        """Begins with the open requests of an earlier coordinator; what else the file holds is removed."""
        for request in requests:
            admission = request.admission
            lines = self._open[admission.id] = _Lines([_line({"admit": asdict(admission)})])
            for choice, rows in request.answered.items():
                lines.answer(admission.id, choice, rows)
            self._open_bytes += sum(map(len, lines.parts))
        await self._written()

    async def admit(self, admission: Admission) -> None:
        """Returns once the record is on disk, or cannot be. Admissions at the same time share one fsync."""
        line = _line({"admit": asdict(admission)})
        self._open[admission.id] = _Lines([line])
        self._open_bytes += len(line)
        self._pending.append(line)
        await self._written()

    def answer(self, request_id: str, choice: ChoiceKey, rows: Sequence[RowResult]) -> None:
        """Tokens of a choice that follow those of earlier calls; written soon, and not synced."""
        if (lines := self._open.get(request_id)) is None:
            return
        line = lines.answer(request_id, choice, rows)
        self._open_bytes += len(line)
        self._pending.append(line)
        self._write_soon()

    def end(self, request_id: str) -> None:
        """The request needs no record any more."""
        lines = self._open.pop(request_id, None)
        if lines is not None:
            self._open_bytes -= sum(map(len, lines.parts))
            self._pending.append(_line({"end": request_id}))
            self._write_soon()

    async def aclose(self) -> None:
        """Writes what is left."""
        if self._writing is not None:
            await self._writing
        self._thread.shutdown()
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
                if self._failed_s is None or loop.time() - self._failed_s >= _RETRY_S:
                    await self._try(pending, is_synced=bool(waiting))
                for written in waiting:
                    if not written.done():
                        written.set_result(None)
        finally:
            self._writing = None

    async def _try(self, pending: list[bytes], *, is_synced: bool) -> None:
        loop = asyncio.get_running_loop()
        try:
            if not self._is_whole or not self._file.is_in_place or self._is_mostly_ended(sum(map(len, pending))):
                lines = [line for lines in self._open.values() for line in lines.parts]
                await loop.run_in_executor(self._thread, self._file.rewrite, b"".join(lines))
            else:
                await loop.run_in_executor(self._thread, self._file.append, b"".join(pending), is_synced)
        except OSError as error:
            if self._failed_s is None:
                _log.warning(
                    "%s: cannot be written: %s; requests are served, but would not survive the coordinator until there "
                    "is room again",
                    self._path,
                    error.strerror,
                )
            self._is_whole, self._failed_s = False, loop.time()
        else:
            if self._failed_s is not None:
                _log.warning("%s: can be written again", self._path)
            self._is_whole, self._failed_s = True, None

    def _is_mostly_ended(self, more_bytes: int) -> bool:
        size = self._file.size + more_bytes
        return not self._open or size > 2 * self._open_bytes + _ENDED_BYTES


class _File:
    """The file, used by one thread at a time."""

    def __init__(self, path: Path) -> None:
        self.size = 0
        self._path = path
        self._descriptor: int | None = None

    @property
    def is_in_place(self) -> bool:
        """Whether the next process finds what was written. The folder may be deleted meanwhile."""
        if self._descriptor is None:
            return False
        with suppress(OSError):
            return os.path.samestat(os.fstat(self._descriptor), self._path.lstat())
        return False

    def append(self, data: bytes, is_synced: bool) -> None:
        """All of `data` or nothing, after a `rewrite`."""
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

    def rewrite(self, data: bytes) -> None:
        """The file holds `data` alone, or is as before."""
        if not data and self.is_in_place:
            self._empty()
            return
        temporary = self._path.with_name(f".{self._path.name}.new")  # a killed process leaves one at most
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            _write_all(descriptor, data, 0)
            os.fdatasync(descriptor)
            temporary.replace(self._path)
            _sync_folder(self._path.parent)
        except OSError:
            os.close(descriptor)
            temporary.unlink(missing_ok=True)
            raise
        self.close()
        self._descriptor, self.size = descriptor, len(data)

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


def _line(record: Mapping[str, Any]) -> bytes:
    text = json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")
    return b"%08x %s\n" % (zlib.crc32(text), text)


def read_journal(path: Path, now: float, served: str = "") -> list[OpenRequest]:
    """The requests whose answers were not complete when a coordinator ended, of the same `served` digest and with
    deadlines after `now` (Unix time), in the order of their admission; empty where there is no journal. OSError where
    it cannot be read."""
    admissions: dict[str, Admission] = {}
    answered: dict[str, dict[ChoiceKey, list[RowResult]]] = {}
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
            case {"end": request_id}:
                admissions.pop(request_id, None)
    return [
        OpenRequest(admission, {choice: tuple(rows) for choice, rows in answered[admission.id].items()})
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

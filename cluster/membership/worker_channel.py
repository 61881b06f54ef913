"""Sends requests to a worker and receives the answers. Progress reports can extend deadlines."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from itertools import count
from typing import Any

from llamaclust.core.errors import DeadlineError, LlamaclustError, ProtocolError, StalledError
from llamaclust.core.sizes import mib
from llamaclust.wire.control import logs, messages
from llamaclust.wire.control.kv_disk import FindKv, KvDone, RestoreKv, SaveKv
from llamaclust.wire.control.messages import CoordinatorMessage, LoadProgress, WorkerRequest
from llamaclust.wire.control.profiles import LinkProfiles, ProfileLinks, ProfileWorker, WorkerProfile
from llamaclust.wire.control.weights import AdaptersSet, FindWeights, FindWeightsProgress, SetAdapters, WeightsFound
from llamaclust.wire.rpc.deadlines import deadline

_ANSWERS: Mapping[type[WorkerRequest], type[messages.WorkerMessage]] = {
    ProfileWorker: WorkerProfile,
    ProfileLinks: LinkProfiles,
    FindWeights: WeightsFound,
    messages.ProbePeer: messages.ProbeResult,
    logs.GetLog: logs.LogTail,
    FindKv: KvDone,
    RestoreKv: KvDone,
    SaveKv: KvDone,
    SetAdapters: AdaptersSet,
}

_SILENT_S = 600.0
"""Seconds after a missed deadline in which a worker that has answered nothing since is asked no more questions."""

Send = Callable[[CoordinatorMessage], Awaitable[None]]
Progress = LoadProgress | FindWeightsProgress
OnProgress = Callable[[Any], None] | None
Key = str | int
Request = Callable[[deadline], Awaitable[Any]]


class SilentError(DeadlineError):
    """A question is not asked, because the worker has missed a deadline and answered nothing since then."""


class ProgressDeadline:
    """A deadline that each progress report extends. Its error says how many bytes the worker has completed."""

    def __init__(self, what: str, timeout_s: float) -> None:
        self._what = what
        self._timeout_s = timeout_s
        self._limit = deadline(what, timeout_s)
        self._at = 0, 0

    def report(self, done_bytes: int, total_bytes: int) -> None:
        if self._limit.is_expired:
            return
        is_first = self._at == (0, 0) != (done_bytes, total_bytes)
        if is_first or done_bytes > self._at[0]:  # Only an increase counts as progress.
            self._at = done_bytes, total_bytes
            self._limit.move(asyncio.get_running_loop().time() + self._timeout_s)

    async def wait(self, request: Request) -> Any:
        try:
            return await request(self._limit)
        except SilentError:
            raise
        except DeadlineError as error:
            done_bytes, total_bytes = self._at
            at = f"{mib(done_bytes)} of {mib(total_bytes)} MiB"
            raise StalledError(f"{self._what} for {self._timeout_s:g} s (timeouts.load): {at}") from error


class WorkerChannel:
    def __init__(self, send: Send) -> None:
        self.send = send
        self._observers: dict[type[Progress], Callable[[Any], None]] = {}
        self._pending: dict[Key, asyncio.Future[Any]] = {}
        self._expected: dict[Key, type] = {}  # Types of the expected answers.
        self._ids = count(1)
        self._locks: dict[str, asyncio.Lock] = {}
        self._error: LlamaclustError | None = None  # Error that all requests raise after the worker is lost.
        self._missed: tuple[DeadlineError, float] | None = None  # The missed deadline of a question, and its time.
        self._late: set[Key] = set()  # Keys of requests whose deadlines have passed.

    def one_at_a_time(self, what: str) -> asyncio.Lock:
        return self._locks.setdefault(what, asyncio.Lock())

    @property
    def is_silent(self) -> bool:
        """True if the worker has missed a deadline within the last ten minutes and answered nothing since then."""
        return self._missed is not None and asyncio.get_running_loop().time() - self._missed[1] < _SILENT_S

    def miss(self, error: DeadlineError) -> None:
        self._missed = error, asyncio.get_running_loop().time()

    def end_silence(self) -> None:
        """Ends the silence, for a worker without which the others do not suffice."""
        self._missed = None

    async def send_request(self, request: WorkerRequest, limit: deadline) -> Any:
        """Sends a question of a start, like `request`. Raises SilentError at once if the worker is silent, because a
        start may have many questions, and would wait for each of them."""
        if self._missed is not None and self.is_silent:
            raise SilentError(f"it is not asked, because it has not answered before: {self._missed[0]}")
        try:
            return await self.request(request, limit)
        except DeadlineError as error:
            if limit.is_expired:
                self.miss(error)
            raise

    async def request(self, request: WorkerRequest, limit: deadline) -> Any:
        """Sends a request and returns its answer. Raises the error that the worker reports, WorkerError if the worker
        is lost, or DeadlineError at the deadline `limit`."""
        request_id = next(self._ids)
        self._expected[request_id] = _ANSWERS[type(request)]
        try:
            return await self.order(request_id, replace(request, request_id=request_id), limit)
        except DeadlineError:
            self._late.add(request_id)
            raise
        finally:
            del self._expected[request_id]

    async def order(self, key: Key, message: CoordinatorMessage, limit: deadline) -> Any:
        if self._error is not None:
            raise self._error
        assert key not in self._pending, f"request {key} is already pending"
        answer = self._pending[key] = asyncio.get_running_loop().create_future()
        try:
            async with limit:
                await self.send(message)
                return await answer
        finally:
            del self._pending[key]

    def answer(self, key: Key, answer: object) -> None:
        """Completes the request `key`. Ignores a late answer. Raises ProtocolError if the answer has the wrong type."""
        pending = self._pending.get(key)
        if pending is not None or key in self._late:
            self._missed = None
            self._late.clear()
        if pending is None or pending.done():
            return
        if isinstance(answer, Exception):
            pending.set_exception(answer)
        elif key in self._expected and not isinstance(answer, expected := self._expected[key]):
            raise ProtocolError(f"request {key}: expected {expected.__name__}, found {type(answer).__name__}")
        else:
            pending.set_result(answer)

    async def with_progress(
        self, kind: type[Progress], request: Request, limit: ProgressDeadline, on_progress: OnProgress
    ) -> Any:
        """Calls `request` and returns its answer. Each progress message of type `kind` extends the deadline `limit`."""

        def observe(progress: Progress) -> None:
            limit.report(progress.done_bytes, progress.total_bytes)
            if on_progress is not None:
                on_progress(progress)

        self._observers[kind] = observe
        try:
            return await limit.wait(request)
        finally:
            del self._observers[kind]

    def observe(self, progress: Progress) -> None:
        if (observer := self._observers.get(type(progress))) is not None:
            observer(progress)

    def fail(self, error: LlamaclustError) -> None:
        """Makes all pending and later requests raise `error`."""
        self._error = error
        for pending in self._pending.values():
            if not pending.done():
                pending.set_exception(error)
                pending.exception()  # Retrieves the exception, because the caller may also be gone.

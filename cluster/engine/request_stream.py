"""Owns the submitted requests that are open. Delivers a request's events to a sink or to a reader."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from copy import copy
from time import monotonic_ns
from typing import Protocol, Self

from llamaclust.cluster.engine.metrics import EndedRequest, Metrics
from llamaclust.cluster.engine.waterfalls import Waterfalls
from llamaclust.cluster.scheduler.requests import (
    Event,
    Failed,
    Finished,
    FinishReason,
    PromptProgress,
    Timings,
    TokenSampled,
    Update,
)
from llamaclust.cluster.scheduler.sequences import Sequence
from llamaclust.core.errors import LlamaclustError, RequestFailedError, WorkerError

_log = logging.getLogger(__name__)


class Sink(Protocol):
    """Receives the events of one request on the engine's event loop. Methods must return soon and must not raise."""

    def begin(self, request: SubmittedRequest) -> None: ...

    def take(self, event: Event) -> None: ...

    def end(self, error: LlamaclustError | None) -> None: ...


class SubmittedRequest:
    def __init__(self, sequence: Sequence, sink: Sink, abort: Callable[[FinishReason], None]) -> None:
        self.sequence = sequence
        self.sink = sink
        self.deadline: asyncio.TimerHandle | None = None
        self._abort = abort

    def abort(self, reason: FinishReason = FinishReason.ABORT) -> None:
        """Ends the request if it is open. Its last event is then `Finished` with this reason."""
        self._abort(reason)

    @property
    def timings(self) -> Timings:
        return self.sequence.timings()

    @property
    def progress(self) -> PromptProgress | None:
        usage, total = self.sequence.usage, self.sequence.prompt_length
        if usage.cached_tokens is None:
            return None
        processed = total if usage.first_ns else min(total, max(usage.cached_tokens, self.sequence.computed))
        since_ms = ((usage.first_ns or monotonic_ns()) - usage.started_ns) / 1e6
        return PromptProgress(total, usage.cached_tokens, processed, since_ms)

    def end(self, error: LlamaclustError | None = None) -> None:
        if self.deadline is not None:
            self.deadline.cancel()
        self.sink.end(copy(error))


class OpenRequests:
    def __init__(self, metrics: Metrics, waterfalls: Waterfalls) -> None:
        self._metrics = metrics
        self._waterfalls = waterfalls
        self._requests: dict[int, SubmittedRequest] = {}
        self._announced = 0  # Number of requests that are not open yet, but need the model.
        self._empty = asyncio.Event()
        self._empty.set()
        self._present = asyncio.Event()

    @property
    def keys(self) -> list[int]:
        return list(self._requests)

    @property
    def are_empty(self) -> bool:
        return not (self._requests or self._announced)

    async def wait_empty(self) -> None:
        await self._empty.wait()

    async def wait_any(self) -> None:
        await self._present.wait()

    def open(self, request: SubmittedRequest, timeout_s: float, expire: Callable[[], None]) -> None:
        request.deadline = asyncio.get_running_loop().call_later(timeout_s, expire)
        self._requests[request.sequence.key] = request
        self._waterfalls.opened(request.sequence)
        self._changed()

    @contextmanager
    def announced(self) -> Iterator[None]:
        """Keeps the model loaded while images of a request are encoded, because the request is not submitted yet."""
        self._announced += 1
        self._changed()
        try:
            yield
        finally:
            self._announced -= 1
            self._changed()

    def _changed(self) -> None:
        present, absent = (self._empty, self._present) if self.are_empty else (self._present, self._empty)
        present.set()
        absent.clear()

    def sequence(self, key: int) -> Sequence:
        return self._requests[key].sequence

    def deliver(self, key: int, updates: Iterable[Update]) -> int:
        tokens = 0
        for update in updates:
            if isinstance(update, Failed):
                error = RequestFailedError if update.is_request_fault else WorkerError
                self.abort(key, error(update.message))
                continue
            self._requests[key].sink.take(update)
            tokens += isinstance(update, TokenSampled)
            if isinstance(update, Finished):
                self._close(key, update.reason)
        return tokens

    def abort(self, key: int, error: LlamaclustError | None = None, reason: FinishReason = FinishReason.ABORT) -> None:
        if error is None:
            request = self._requests[key]
            request.sink.take(Finished(reason, request.timings))
        self._close(key, "error" if error else reason, error)

    def _close(self, key: int, reason: str, error: LlamaclustError | None = None) -> None:
        submitted = self._requests.pop(key)
        submitted.end(error)
        now_ns = monotonic_ns()
        self._waterfalls.ended(key, str(reason), now_ns)
        sequence = submitted.sequence
        request, timings, seconds = sequence.request, sequence.timings(), (now_ns - sequence.usage.arrived_ns) / 1e9
        ended = EndedRequest(str(reason), timings, seconds, request.operation, is_restored=bool(request.answered))
        self._metrics.finished(ended)
        if _log.isEnabledFor(logging.INFO):
            fields = {  # The log must not include text of the request.
                "request": request.request_id,
                "reason": str(reason),
                "prompt_tokens": timings.prompt_tokens,
                "tokens": timings.generated_tokens,
                "ttft_ms": round(timings.ttft_ms, 3),
                "seconds": round(seconds, 3),
            }
            _log.info("request ended%s", f": {error}" if error else "", extra=fields)
        self._changed()


class RequestStream:
    """Yields the events of a request. The last event is `Finished`, unless the request fails and an error is raised.
    Leaving `async with` or cancelling the reading task aborts the request."""

    def __init__(self, submit: Callable[[Sink], SubmittedRequest]) -> None:
        # None or an error marks the end of the events.
        self._events: asyncio.Queue[Event | LlamaclustError | None] = asyncio.Queue()
        self._request = submit(self)

    def begin(self, request: SubmittedRequest) -> None:
        """Does nothing, because the constructor gets the request from `submit`."""

    def take(self, event: Event) -> None:
        self._events.put_nowait(event)

    def end(self, error: LlamaclustError | None) -> None:
        self._events.put_nowait(error)

    @property
    def timings(self) -> Timings:
        return self._request.timings

    def abort(self) -> None:
        self._request.abort()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.abort()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        try:
            event = await self._events.get()
        except asyncio.CancelledError:
            self.abort()
            raise
        if event is not None and not isinstance(event, LlamaclustError):
            return event
        self._events.put_nowait(event)  # The end mark goes back into the queue, so that further calls end too.
        raise StopAsyncIteration if event is None else copy(event)

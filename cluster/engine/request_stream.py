"""A submitted request: a stream of events, and cancellation. Its engine's side: a mailbox for each open request."""

from __future__ import annotations

import asyncio
import logging
import weakref
from collections.abc import Callable, Iterable
from copy import copy
from time import monotonic_ns
from typing import Protocol, Self

from llamaclust.cluster.engine.inbox import Inbox
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


class Follower(Protocol):
    """Takes a request's events within the engine's own work: it must return soon, raise nothing, and end no request
    meanwhile."""

    def take(self, event: Event) -> None: ...

    def end(self, error: LlamaclustError | None) -> None:
        """No more events come; `error`: why, where the request failed."""
        ...


class Mailbox:
    """Events from the engine to one reader, and their end."""

    def __init__(self, sequence: Sequence) -> None:
        self.sequence = sequence
        self.deadline: asyncio.TimerHandle | None = None
        self._follower: Follower | None = None  # gets what comes instead of the inbox
        self._events: Inbox[Event | LlamaclustError | None] = Inbox()  # an error or None ends them

    def put(self, event: Event) -> None:
        if self._follower is None:
            self._events.put(event)
        else:
            self._follower.take(event)

    def close(self, error: LlamaclustError | None = None) -> None:
        """No more events; the reader gets `error` after those that are there."""
        if self.deadline is not None:
            self.deadline.cancel()
        if self._follower is None:
            self._events.put(error)
        else:
            self._follower.end(copy(error))

    def follow(self, follower: Follower) -> None:
        """It gets what is there and what comes."""
        while len(self._events):
            event = self._events.take()
            if event is None or isinstance(event, LlamaclustError):
                follower.end(copy(event))
            else:
                follower.take(event)
        self._follower = follower

    async def get(self) -> Event:
        """The next event. StopAsyncIteration after the last one, or the error."""
        event = await self._events.get()
        if event is not None and not isinstance(event, LlamaclustError):
            return event
        self._events.put(event)  # the end stays
        raise StopAsyncIteration if event is None else copy(event)


class OpenRequests:
    """The mailboxes of an engine's requests that have not ended, by their sequences' keys."""

    def __init__(self, metrics: Metrics, waterfalls: Waterfalls) -> None:
        self._metrics = metrics
        self._waterfalls = waterfalls
        self._mailboxes: dict[int, Mailbox] = {}
        self._empty = asyncio.Event()
        self._empty.set()
        self._present = asyncio.Event()

    @property
    def keys(self) -> list[int]:
        return list(self._mailboxes)

    @property
    def are_empty(self) -> bool:
        return not self._mailboxes

    async def wait_empty(self) -> None:
        await self._empty.wait()

    async def wait_any(self) -> None:
        """Returns while there is one."""
        await self._present.wait()

    def open(self, mailbox: Mailbox, timeout_s: float, expire: Callable[[], None]) -> None:
        mailbox.deadline = asyncio.get_running_loop().call_later(timeout_s, expire)
        self._mailboxes[mailbox.sequence.key] = mailbox
        self._waterfalls.opened(mailbox.sequence)
        self._empty.clear()
        self._present.set()

    def sequence(self, key: int) -> Sequence:
        return self._mailboxes[key].sequence

    def deliver(self, key: int, updates: Iterable[Update]) -> int:
        """Hands a sequence's updates to its reader; how many tokens were among them."""
        tokens = 0
        for update in updates:
            if isinstance(update, Failed):
                error = RequestFailedError if update.is_request_fault else WorkerError
                self.abort(key, error(update.message))
                continue
            self._mailboxes[key].put(update)
            tokens += isinstance(update, TokenSampled)
            if isinstance(update, Finished):
                self._close(key, update.reason)
        return tokens

    def abort(self, key: int, error: LlamaclustError | None = None) -> None:
        """Ends a request: cancelled, or failed with an error."""
        if error is None:
            mailbox = self._mailboxes[key]
            mailbox.put(Finished(FinishReason.ABORT, mailbox.sequence.timings()))
        self._close(key, "error" if error else FinishReason.ABORT, error)

    def _close(self, key: int, reason: str, error: LlamaclustError | None = None) -> None:
        mailbox = self._mailboxes.pop(key)
        mailbox.close(error)
        now_ns = monotonic_ns()
        self._waterfalls.ended(key, str(reason), now_ns)
        sequence = mailbox.sequence
        request, timings, seconds = sequence.request, sequence.timings(), (now_ns - sequence.arrived_ns) / 1e9
        ended = EndedRequest(str(reason), timings, seconds, request.operation, is_restored=bool(request.answered))
        self._metrics.finished(ended)
        if _log.isEnabledFor(logging.INFO):
            fields = {  # none of its text
                "request": request.request_id,
                "reason": str(reason),
                "prompt_tokens": timings.prompt_tokens,
                "tokens": timings.generated_tokens,
                "ttft_ms": round(timings.ttft_ms, 3),
                "seconds": round(seconds, 3),
            }
            _log.info("request ended%s", f": {error}" if error else "", extra=fields)
        if not self._mailboxes:
            self._empty.set()
            self._present.clear()


class RequestStream:
    """The events of one request, `Finished` last; a request that failed ends with an exception instead.

    Leaving `async with`, `abort`, cancelling the reading task and dropping the stream end the request and free its KV
    memory. It also ends at its deadline.
    """

    def __init__(self, mailbox: Mailbox, abort: Callable[[], None]) -> None:
        self._mailbox = mailbox
        self._abort = abort
        self._dropped = weakref.finalize(self, _abort_later, asyncio.get_running_loop(), abort)
        self._dropped.atexit = False

    @property
    def timings(self) -> Timings:
        """As far as the request came."""
        return self._mailbox.sequence.timings()

    @property
    def progress(self) -> PromptProgress | None:
        """Of the prompt; None before the request is started."""
        sequence = self._mailbox.sequence
        if sequence.cached_tokens is None:
            return None
        total = sequence.prompt_length
        processed = total if sequence.first_ns else min(total, max(sequence.cached_tokens, sequence.computed))
        since_ms = ((sequence.first_ns or monotonic_ns()) - sequence.started_ns) / 1e6
        return PromptProgress(total, sequence.cached_tokens, processed, since_ms)

    def follow(self, follower: Follower) -> None:
        """Instead of reading: it gets the events as they come, without a change of task for each."""
        self._mailbox.follow(follower)

    def abort(self) -> None:
        """Ends the request where it has not ended; its last event is `Finished` with reason ABORT."""
        self._dropped.detach()
        self._abort()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.abort()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        try:
            return await self._mailbox.get()
        except asyncio.CancelledError:
            self.abort()
            raise


def _abort_later(loop: asyncio.AbstractEventLoop, abort: Callable[[], None]) -> None:
    """The garbage collector may run in any thread."""
    if not loop.is_closed():
        loop.call_soon_threadsafe(abort)

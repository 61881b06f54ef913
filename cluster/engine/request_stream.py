"""What whoever submitted a request holds: its events as they come, and the means to give it up."""

from __future__ import annotations

import asyncio
import weakref
from collections import deque
from collections.abc import Callable
from copy import copy
from types import TracebackType
from typing import Self

from llamaclust.cluster.scheduler.requests import Event, Timings
from llamaclust.cluster.scheduler.sequences import Sequence
from llamaclust.core.errors import LlamaclustError


class Mailbox:
    """Events from the engine to one reader, and their end."""

    def __init__(self, sequence: Sequence) -> None:
        self.sequence = sequence
        self.deadline: asyncio.TimerHandle | None = None
        self._events: deque[Event] = deque()
        self._is_closed = False
        self._error: LlamaclustError | None = None
        self._reader: asyncio.Future[None] | None = None

    def put(self, event: Event) -> None:
        self._events.append(event)
        self._wake()

    def close(self, error: LlamaclustError | None = None) -> None:
        """No more events; the reader gets `error` after those that are there."""
        self._is_closed = True
        self._error = error
        if self.deadline is not None:
            self.deadline.cancel()
        self._wake()

    async def get(self) -> Event:
        """The next event. StopAsyncIteration after the last one, or the error."""
        while not self._events:
            if self._error is not None:
                raise copy(self._error)
            if self._is_closed:
                raise StopAsyncIteration
            assert self._reader is None, "a stream has one reader"
            self._reader = asyncio.get_running_loop().create_future()
            try:
                await self._reader
            finally:
                self._reader = None
        return self._events.popleft()

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)


class RequestStream:
    """The events of one request, `Finished` last; a request that failed ends with an exception instead.

    Leaving `async with`, `abort`, cancelling whoever reads and dropping the stream end the request: it frees its KV
    memory. It ends by itself at its deadline, so that nobody waits for ever.
    """

    def __init__(self, mailbox: Mailbox, abort: Callable[[], None]) -> None:
        self._mailbox = mailbox
        self._abort = abort
        loop = asyncio.get_running_loop()
        self._dropped = weakref.finalize(self, _abort_later, loop, abort)
        self._dropped.atexit = False

    @property
    def timings(self) -> Timings:
        """As far as the request came."""
        return self._mailbox.sequence.timings()

    def abort(self) -> None:
        """Ends the request where it has not ended; its last event is `Finished` with reason ABORT."""
        self._dropped.detach()
        self._abort()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
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

"""A reply that is kept: computed whether a client reads it or not, and read from any place."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager, suppress
from enum import Enum, auto
from itertools import count
from typing import Protocol

from llamaclust.cluster.api.errors import HttpError, internal_error
from llamaclust.cluster.api.replies.reply import Event, Position, Reply
from llamaclust.cluster.api.replies.ticket import Ticket
from llamaclust.cluster.api.settings import ApiSettings
from llamaclust.core.backoff import Backoff
from llamaclust.core.errors import (
    ClusterStoppingError,
    DeadlineError,
    LlamaclustError,
    QueueFullError,
    RequestCancelledError,
)

_EVENT_BYTES = 256
"""Of Python's objects for an event, beside its data."""
_BUSY = Backoff(1.0, 30.0)
"""Between attempts to submit a request."""
_TOO_LONG = "the request took longer than timeouts.request, the coordinator's restart included"

_log = logging.getLogger(__name__)


class ReplyState(Enum):
    """Each follows the ones above it, and may leave some out."""

    ADDED = auto()  # nothing is computed before `begin`
    POSTPONED = auto()  # until a client reads it
    BEGUN = auto()  # it is submitted, or waits for a place in the queue
    ENDED = auto()  # with all its events, or an error


class ReplyOwner(Protocol):
    """Keeps replies."""

    def expired(self, kept: KeptReply) -> None:
        """No client has read it for a while."""
        ...

    def completed(self, kept: KeptReply) -> None:
        """It is computed in the background, and has all that its client will ask for."""
        ...

    def grew(self, kept: KeptReply, more_bytes: int) -> None:
        """It holds so many bytes more, or less; it may be failed now."""
        ...


class KeptReply:
    """Is computed from `begin` until it ends or is `aclose`d; expires when no client has read it for a while, one that
    its client does not wait for not before it has ended."""

    def __init__(
        self,
        ticket: Ticket,
        settings: ApiSettings,
        owner: ReplyOwner,
        *,
        is_streamed: bool,
        is_background: bool = False,
    ) -> None:
        """`is_background`: its client does not wait for it."""
        self.ticket = ticket
        self.is_streamed = is_streamed
        self.is_background = is_background
        self.held_bytes = 0
        self.is_sent = False  # a connection took all of it
        self.acknowledgement: bytes | None = None  # see `Reply`; None also before it has begun
        self._state = ReplyState.ADDED
        self._settings = settings
        self._owner = owner
        self._content = _Content()
        self._error: LlamaclustError | None = None
        self._readers = 0
        self._progress = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None
        self._postponed: Callable[[], None] | None = None
        self._reply: Reply | None = None

    @property
    def is_read(self) -> bool:
        """At this moment."""
        return self._readers > 0

    @property
    def is_running(self) -> bool:
        """Or is about to run."""
        return self._state in (ReplyState.ADDED, ReplyState.BEGUN)

    @property
    def is_complete(self) -> bool:
        """Ended without an error."""
        return self._state is ReplyState.ENDED and self._error is None

    @property
    def error(self) -> LlamaclustError | None:
        """What ended it."""
        return self._error

    @property
    def gives_way(self) -> bool:
        """Whether nothing is computed for it, and no client reads it."""
        return not self.is_read and not self.is_running

    @property
    def parts(self) -> list[bytes]:
        """Of a complete one: its JSON, or its events."""
        return self._content.whole or [event.data for event, _ in self._content.events]

    def postpone(self, begin: Callable[[], None]) -> None:
        """`begin` is called when a client reads it, or with `resume`."""
        self._postponed, self._state = begin, ReplyState.POSTPONED
        self._expire_later()

    def resume(self) -> None:
        """Begins what was postponed."""
        begin, self._postponed = self._postponed, None
        if begin is not None:
            begin()

    async def begin(
        self, reply: Reply, *, until_s: float | None = None, admit: Callable[[], Awaitable[None] | None] | None = None
    ) -> Awaitable[None] | None:
        """Submits the request, and returns what `admit` then does: readers get nothing before that is done. Raises what
        refuses the request, also that it was closed before. `until_s`, in the event loop's time: where the machine is
        busy, it is tried again until then, and then the reply ends."""
        try:
            await self._start(reply, until_s)
            admitted = None if admit is None else admit()
        except BaseException as error:
            self._end(error if isinstance(error, LlamaclustError) else RequestCancelledError())
            await reply.aclose()
            raise
        self._reply, self.acknowledgement = reply, reply.acknowledgement
        self._content.has_measurements = reply.has_measurements
        self._notify()
        self._task = asyncio.create_task(self._run(reply, until_s, admitted))
        self._expire_later()
        return admitted

    async def has_measurements(self) -> bool:
        """See `Reply`. Waits until it has begun; raises the error that ended it before."""
        with self._reading():
            while self._content.has_measurements is None:
                if self._state is ReplyState.ENDED:
                    self._raise_error()
                    return False
                await self._changed()
            return self._content.has_measurements

    def fail(self, error: LlamaclustError) -> None:
        """It ends with an error, which readers get; what it holds is freed."""
        self._end(error)
        if self._task is not None and self._task is not asyncio.current_task():
            self._task.cancel()
        self._content = _Content()
        self._hold(-self.held_bytes)
        self._expire_later()

    def stop(self) -> None:
        """The coordinator ends: readers learn it where the reply has not ended before."""
        self._end(ClusterStoppingError("the cluster is stopping"))

    async def ended(self) -> None:
        """Returns when it has all its events, or an error."""
        while self._state is not ReplyState.ENDED:
            await self._progress.wait()

    async def aclose(self) -> None:
        """Readers of a reply that has not ended get an error. Nothing of it runs afterwards, except that `begin` gives
        up first where it is under way."""
        if self._timer is not None:
            self._timer.cancel()
        self._end(RequestCancelledError())
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        if self._reply is not None:  # a task that is cancelled before its first step closes nothing
            await self._reply.aclose()

    async def read(self, after: Position, *, with_comments: bool) -> AsyncGenerator[Event | None, None]:
        """The events that a client lacks, those to come as well; raises the error that ended the reply. None each time
        that nothing came for a while."""
        with self._reading():
            place = 0
            while True:
                while place < len(self._content.events):
                    event, number = self._content.events[place]
                    place += 1
                    if not after.has(event, number):
                        yield event
                if self._state is ReplyState.ENDED:
                    self.is_sent = True
                    self._raise_error()
                    return
                if not await self._changed() and with_comments:
                    yield None

    async def whole(self) -> Sequence[bytes]:
        """The reply that is not streamed."""
        with self._reading():
            while self._state is not ReplyState.ENDED:
                await self._changed()
            self._raise_error()
            return self._content.whole

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """A reply does not expire meanwhile."""
        self._readers += 1
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self.resume()
        try:
            yield
        finally:
            self._readers -= 1
            self._expire_later()

    def _expire_later(self) -> None:
        if self.is_running and self.is_background:
            return
        if self._readers == 0 and self._timer is None:
            kept_s = self._settings.background_s if self.is_background else self._settings.resume_s
            self._timer = asyncio.get_running_loop().call_later(kept_s, self._owner.expired, self)

    async def _changed(self) -> bool:
        """Waits for something new; False where nothing came for a while."""
        progress = self._progress
        with suppress(TimeoutError):
            async with asyncio.timeout(self._settings.keepalive_s):
                await progress.wait()
            return True
        return False

    def _notify(self) -> None:
        """Each reader waits for an event that is set once."""
        self._progress.set()
        self._progress = asyncio.Event()

    async def _run(self, reply: Reply, until_s: float | None, admitted: Awaitable[None] | None) -> None:
        try:
            if admitted is not None:
                await asyncio.shield(admitted)
            async with asyncio.timeout_at(until_s):
                await self._take(reply)
            self._end(None)
            if self.is_background:
                self._owner.completed(self)
        except LlamaclustError as error:
            self._end(error)
        except TimeoutError:
            self._end(DeadlineError(_TOO_LONG))
        except Exception:  # noqa: BLE001  a mistake of ours, which ends this reply alone
            _log.exception("request %s failed", self.ticket.id)
            self._end(internal_error())
        finally:
            await reply.aclose()
        self._reply = None  # with what it was made from
        self._expire_later()

    async def _take(self, reply: Reply) -> None:
        if not self.is_streamed:
            async with aclosing(await reply.whole()) as body:
                async for part in body:
                    self._content.whole.append(part)
                    self._keep(len(part))
            return
        async for event in reply.events():
            if event is not None:
                self._content.add(event)
                self._keep(len(event.data), _EVENT_BYTES)
                self._notify()

    def _keep(self, content_bytes: int, more_bytes: int = 0) -> None:
        """Counts them. HttpError where the reply has too many, LlamaclustError where it was ended for those of all."""
        self._content.size_bytes += content_bytes
        self._hold(content_bytes + more_bytes)
        self._raise_error()
        if self._content.size_bytes > (most := self._settings.max_reply_bytes):
            what = f"the reply is larger than {most >> 20} MiB; ask for less at once"
            raise HttpError(500, "reply_too_large", what)

    def _hold(self, more_bytes: int) -> None:
        self.held_bytes += more_bytes
        self._owner.grew(self, more_bytes)

    def _end(self, error: LlamaclustError | None) -> None:
        """Once; what comes later is of no interest."""
        if self._state is not ReplyState.ENDED:
            self._error = error
            self._state = ReplyState.ENDED
            self._notify()

    async def _start(self, reply: Reply, until_s: float | None) -> None:
        clock, failures = asyncio.get_running_loop().time, count()
        if self._state is not ReplyState.ENDED:
            self._state = ReplyState.BEGUN
        while self._state is ReplyState.BEGUN:
            try:
                await reply.start()
                break
            except (QueueFullError, DeadlineError) as busy:
                if until_s is None:
                    raise
                if clock() >= until_s:
                    raise DeadlineError(_TOO_LONG) from busy
                await asyncio.sleep(
                    busy.retry_after_s if isinstance(busy, QueueFullError) else _BUSY.pause_s(next(failures))
                )
        self._raise_error()


class _Content:
    """What a reply consists of so far."""

    def __init__(self) -> None:
        self.events: list[tuple[Event, int]] = []  # with their numbers within their slots
        self.whole: list[bytes] = []  # of one that is not streamed
        self.has_measurements: bool | None = None  # None: it has not begun
        self.size_bytes = 0
        self._numbers = Position()

    def add(self, event: Event) -> None:
        self.events.append((event, self._numbers.add(event)))

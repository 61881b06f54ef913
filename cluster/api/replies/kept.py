"""A reply that is kept: computed whether a client reads it or not, and read from any place."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager, suppress
from enum import Enum, auto

from llamaclust.cluster.api.errors import HttpError
from llamaclust.cluster.api.replies.reply import Event, Position, Reply
from llamaclust.cluster.api.replies.ticket import Ticket
from llamaclust.cluster.api.settings import ApiSettings
from llamaclust.core.errors import LlamaclustError, QueueFullError, RequestCancelledError

_log = logging.getLogger(__name__)


class ReplyState(Enum):
    """Each follows the ones above it, and may leave some out."""

    ADDED = auto()  # nothing is computed before `begin`
    POSTPONED = auto()  # until a client reads it
    BEGUN = auto()  # it is submitted, or waits for a place in the queue
    ENDED = auto()  # with all its events, or an error


class KeptReply:
    """Is computed from `begin` until it ends or is `aclose`d; expires when no client has read it for a while."""

    def __init__(
        self, ticket: Ticket, settings: ApiSettings, expired: Callable[[KeptReply], None], *, is_streamed: bool
    ) -> None:
        self.ticket = ticket
        self.is_streamed = is_streamed
        self.held_bytes = 0
        self.is_sent = False  # a connection took all of it
        self._state = ReplyState.ADDED
        self._settings = settings
        self._expired = expired
        self._events: list[tuple[Event, int]] = []  # with their numbers within their slots
        self._numbers = Position()
        self._whole: list[bytes] | None = None
        self._error: LlamaclustError | None = None
        self._readers = 0
        self._progress = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None
        self._postponed: Callable[[], None] | None = None
        self._reply: Reply | None = None

    @property
    def gives_way(self) -> bool:
        """Whether nothing is computed for it, and no client reads it."""
        return self._readers == 0 and self._state in (ReplyState.ENDED, ReplyState.POSTPONED)

    def postpone(self, begin: Callable[[], None]) -> None:
        """`begin` is called when a client reads it."""
        self._postponed, self._state = begin, ReplyState.POSTPONED
        self._expire_later()

    async def begin(self, reply: Reply, *, waits_s: float = 0.0) -> None:
        """Submits the request; tries for `waits_s` where the queue is full. Raises what refuses it, also that it was
        closed before."""
        try:
            await self._start(reply, waits_s)
        except BaseException as error:
            self._end(error if isinstance(error, LlamaclustError) else RequestCancelledError())
            await reply.aclose()
            raise
        self._reply = reply
        self._task = asyncio.create_task(self._run(reply))
        self._expire_later()

    def fail(self, error: LlamaclustError) -> None:
        """It cannot be computed; readers get the error."""
        self._end(error)
        self._expire_later()

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
                while place < len(self._events):
                    event, number = self._events[place]
                    place += 1
                    if not after.has(event, number):
                        yield event
                if self._state is ReplyState.ENDED:
                    self.is_sent = True
                    self._raise_error()
                    return
                if not await self._changed() and with_comments:
                    yield None

    async def whole(self) -> list[bytes]:
        """The reply that is not streamed."""
        with self._reading():
            while self._state is not ReplyState.ENDED:
                await self._changed()
            self._raise_error()
            assert self._whole is not None
            return self._whole

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
        begin, self._postponed = self._postponed, None
        if begin is not None:
            begin()
        try:
            yield
        finally:
            self._readers -= 1
            self._expire_later()

    def _expire_later(self) -> None:
        if self._readers == 0 and self._timer is None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(self._settings.resume_s, self._expired, self)

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

    async def _run(self, reply: Reply) -> None:
        try:
            if self.is_streamed:
                async for event in reply.events():
                    if event is not None:
                        self._append(event)
            else:
                self._whole = await reply.whole()
                self.held_bytes += sum(map(len, self._whole))
            self._end(None)
        except LlamaclustError as error:
            self._end(error)
        except Exception:  # noqa: BLE001  a mistake of ours, which ends this reply alone
            _log.exception("request %s failed", self.ticket.id)
            self._end(LlamaclustError("internal error; the coordinator's log says more"))
        finally:
            await reply.aclose()

    def _append(self, event: Event) -> None:
        self._events.append((event, self._numbers.add(event)))
        self.held_bytes += len(event.data)
        if self.held_bytes > self._settings.max_reply_bytes:
            most = self._settings.max_reply_bytes >> 20
            raise HttpError(500, "reply_too_large", f"the reply is larger than {most} MiB; ask for less at once")
        self._notify()

    def _end(self, error: LlamaclustError | None) -> None:
        """Once; what comes later is of no interest."""
        if self._state is not ReplyState.ENDED:
            self._error = error
            self._state = ReplyState.ENDED
            self._notify()

    async def _start(self, reply: Reply, waits_s: float) -> None:
        end = asyncio.get_running_loop().time() + waits_s
        if self._state is not ReplyState.ENDED:
            self._state = ReplyState.BEGUN
        while self._state is ReplyState.BEGUN:
            try:
                await reply.start()
                break
            except QueueFullError as full:
                if asyncio.get_running_loop().time() >= end:
                    raise
                await asyncio.sleep(full.retry_after_s)
        self._raise_error()

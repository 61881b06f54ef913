"""A reply that is kept: computed whether a client reads it or not, its log read from any place."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager
from functools import partial
from itertools import count
from typing import Any, Final, Protocol

from llamaclust.cluster.front.errors import HttpError, internal_error
from llamaclust.cluster.front.json_text import off_loop_if_large
from llamaclust.cluster.front.replies.reading import entries_of, whole_body
from llamaclust.cluster.front.replies.reply import Computation, MakeView, Reply, View
from llamaclust.cluster.front.replies.ticket import Ticket
from llamaclust.cluster.front.settings import ApiSettings
from llamaclust.cluster.front.text.answer import TextChunk
from llamaclust.cluster.front.text.answer_log import AnswerLog, LogReader
from llamaclust.cluster.front.text.sharing import RowStorage
from llamaclust.core.backoff import Backoff
from llamaclust.core.errors import (
    ClusterStoppingError,
    DeadlineError,
    LlamaclustError,
    QueueFullError,
    RequestCancelledError,
)

_FRAME_BYTES: Final = 250
"""About the bytes of an event beside its text and logprobs, and of a token in JSON."""
_TOP_BYTES: Final = 8
_PROMPT_TOKEN_BYTES: Final = 36
_BUSY = Backoff(1.0, 30.0)
"""Between attempts to submit a request."""
_TOO_LONG = "the request took longer than timeouts.request, the coordinator's restart included"

_log = logging.getLogger(__name__)


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
        self.acknowledgement: bytes | None = None  # see `Reply`; None also before it has begun
        self.log = AnswerLog(self._grow, is_held=True)
        self._content_bytes = 0
        self._is_postponed = False  # nothing is computed until a client reads it
        self._settings = settings
        self._owner = owner
        self._readers = 0
        self._view: MakeView | None = None
        self._has_measurements: bool | None = None  # None: it has not begun
        self._begun = asyncio.Event()  # also where it has ended before
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None
        self._postponed: Callable[[], None] | None = None
        self._computation: Computation | None = None

    @property
    def is_read(self) -> bool:
        """Whether a client reads it at this moment."""
        return self._readers > 0

    @property
    def is_running(self) -> bool:
        """Whether it is computed, or about to be."""
        return not self.log.is_over and not self._is_postponed

    @property
    def is_complete(self) -> bool:
        """Whether it ended without an error."""
        return self.log.is_over and self.log.error is None

    @property
    def error(self) -> LlamaclustError | None:
        """What ended it."""
        error = self.log.error
        return error if error is None or isinstance(error, LlamaclustError) else internal_error()

    @property
    def gives_way(self) -> bool:
        """Whether nothing is computed for it, and no client reads it."""
        return not self.is_read and not self.is_running

    def view(self) -> View:
        """A new reader's view of the log, which has begun."""
        assert self._view is not None
        return self._view(self.log)

    def postpone(self, begin: Callable[[], None]) -> None:
        """`begin` is called when a client reads it, or with `resume`."""
        self._postponed, self._is_postponed = begin, True
        self._expire_later()

    def resume(self) -> None:
        """Begins what was postponed."""
        begin, self._postponed = self._postponed, None
        if begin is not None:
            begin()

    async def begin(
        self,
        computation: Computation,
        *,
        until_s: float | None = None,
        admit: Callable[[], Awaitable[None] | None] | None = None,
    ) -> Awaitable[None] | None:
        """Submits the request, and returns what `admit` then does: readers get nothing before that is done. Raises what
        refuses the request, also that it was closed before. `until_s`, in the event loop's time: where the machine is
        busy, it is tried again until then, and then the reply ends."""
        try:
            await self._submit(computation, until_s)
            admitted = None if admit is None else admit()
        except BaseException as error:
            self._fail(error if isinstance(error, LlamaclustError) else RequestCancelledError())
            await computation.aclose()
            raise
        self._computation, reply = computation, computation.reply
        self._view, self._has_measurements = reply.view, reply.has_measurements
        self.acknowledgement = reply.acknowledgement
        self._begun.set()
        self._task = asyncio.create_task(self._run(computation, until_s, admitted))
        self._expire_later()
        return admitted

    async def has_measurements(self) -> bool:
        """See `Reply`. Waits until it has begun; raises the error that ended it before."""
        with self.reading():
            await self._begun.wait()
        if self._has_measurements is None:
            self._raise_error()
        return bool(self._has_measurements)

    def fail(self, error: LlamaclustError) -> None:
        """It ends with an error, which readers get, and its computation as well; what it holds is freed."""
        self._fail(error)
        self.log.clear()
        self._hold(-self.held_bytes)
        self._expire_later()

    def stop(self) -> None:
        """The coordinator ends: readers learn it where the reply has not ended before."""
        self._fail(ClusterStoppingError("the cluster is stopping"))

    async def aclose(self) -> None:
        """Readers of a reply that has not ended get an error. Nothing of it runs afterwards, except that `begin` gives
        up first where it is under way."""
        if self._timer is not None:
            self._timer.cancel()
        self._fail(RequestCancelledError())
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        if self._computation is not None:  # a task that is cancelled before its first step closes nothing
            await self._computation.aclose()

    async def whole(self) -> list[bytes]:
        """The parts of a reply that is not streamed, once it has ended. Raises the error that ended it."""
        with self.reading():
            await self.log.wait_over()
            self._raise_error()
            try:
                async with aclosing(whole_body(self.view(), self.log)) as body:
                    return [part async for part in body]
            except LlamaclustError:
                raise
            except Exception:  # noqa: BLE001  a mistake of ours, which ends this reply alone
                _log.exception("request %s failed", self.ticket.id)
                raise internal_error() from None

    async def value(self) -> Any:
        """The JSON of a complete one as a value, also of one that is streamed."""
        parts = self.log.parts()
        return await off_loop_if_large(partial(self.view().whole, parts), entries_of(self.log, parts))

    @contextmanager
    def reading(self) -> Iterator[LogReader]:
        """A reader of the log from its beginning; the reply does not expire meanwhile."""
        self._readers += 1
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self.resume()
        try:
            with LogReader(self.log) as reader:
                yield reader
        finally:
            self._readers -= 1
            self._expire_later()

    def _expire_later(self) -> None:
        if self.is_running and self.is_background:
            return
        if self._readers == 0 and self._timer is None:
            kept_s = self._settings.background_s if self.is_background else self._settings.resume_s
            self._timer = asyncio.get_running_loop().call_later(kept_s, self._owner.expired, self)

    async def _run(self, computation: Computation, until_s: float | None, admitted: Awaitable[None] | None) -> None:
        try:
            if admitted is not None:
                await asyncio.shield(admitted)
            self.log.release()
            async with asyncio.timeout_at(until_s):
                await self.log.wait_over()
            self.log.raise_error()
            await self._complete(computation.reply)
        except TimeoutError:
            self._fail(DeadlineError(_TOO_LONG))
        except LlamaclustError as error:
            self._fail(error)
        except Exception:  # noqa: BLE001  a mistake of ours, which ends this reply alone
            _log.exception("request %s failed", self.ticket.id)
            self._fail(internal_error())
        finally:
            await computation.aclose()
        self._computation = None
        self._expire_later()

    async def _complete(self, reply: Reply) -> None:
        if reply.is_stored:
            await self.value()
        if self.is_background:
            self._owner.completed(self)

    def _grow(self, prompt: int, chunk: TextChunk) -> None:
        """Counts a chunk of the log. HttpError where the reply has too many, LlamaclustError where it was ended for
        those of all."""
        packed = self.log.content.storage is RowStorage.PACKED
        rows = len(chunk.rows) + len(chunk.prompt_rows)
        data_bytes = len(chunk.text) + _TOP_BYTES * (chunk.entries - rows)
        self._content_bytes += data_bytes + _FRAME_BYTES * (rows or not packed)
        self._hold(data_bytes + self.log.content.storage.row_bytes * (rows or not packed))
        self._raise_error()
        if self._content_bytes > (most := self._settings.max_reply_bytes):
            what = f"the reply is larger than {most >> 20} MiB; ask for less at once"
            raise HttpError(500, "reply_too_large", what)

    def _raise_error(self) -> None:
        if (error := self.error) is not None:
            raise error

    def _hold(self, more_bytes: int) -> None:
        self.held_bytes += more_bytes
        self._owner.grew(self, more_bytes)

    def _fail(self, error: LlamaclustError) -> None:
        """Once; what comes later is of no interest."""
        self.log.fail(error)
        self._begun.set()

    async def _submit(self, computation: Computation, until_s: float | None) -> None:
        clock, failures = asyncio.get_running_loop().time, count()
        self._is_postponed = False
        while not self.log.is_over:
            try:
                await computation.submit(self.log, is_kept=True)
                break
            except (QueueFullError, DeadlineError) as busy:
                self._content_bytes = 0
                self._hold(-self.held_bytes)
                if until_s is None:
                    raise
                if clock() >= until_s:
                    raise DeadlineError(_TOO_LONG) from busy
                await asyncio.sleep(
                    busy.retry_after_s if isinstance(busy, QueueFullError) else _BUSY.pause_s(next(failures))
                )
        self._raise_error()
        self._hold(_PROMPT_TOKEN_BYTES * sum(len(generation.prompt) for generation in self.log.generations))

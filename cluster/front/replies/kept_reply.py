"""A reply and the log of its answers. Clients can read the log while the reply is computed or later."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing, contextmanager
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any, Final

from llamaclust.cluster.front.errors import HttpError, internal_error
from llamaclust.cluster.front.json_text import (
    JsonBody,
    entries_of,
    is_large,
    json_body,
    off_loop_if,
)
from llamaclust.cluster.front.replies.recording import Recording
from llamaclust.cluster.front.replies.reply import Framing, MakeView, Reply, View, identified
from llamaclust.cluster.front.text.answer import TextChunk
from llamaclust.cluster.front.text.answer_log import AnswerLog, LogItem, LogReader
from llamaclust.cluster.front.text.image_rows import RowLeases
from llamaclust.cluster.front.text.sharing import RowStorage
from llamaclust.cluster.state.adapters import AdapterUnloadedError
from llamaclust.cluster.state.journal_records import Instant, RequestContext
from llamaclust.core.backoff import Backoff
from llamaclust.core.errors import (
    ClusterStoppingError,
    DeadlineError,
    LlamaclustError,
    QueueFullError,
    RequestCancelledError,
)
from llamaclust.model.chat.tools.events import CallBegun
from llamaclust.wire.rpc.deadlines import deadline

if TYPE_CHECKING:
    from llamaclust.cluster.front.replies.reply_cache import ReplyCache

_TURN_COST: Final = 2048
"""Cost after which a reader lets other tasks run. A log entry costs `_ENTRY_COST`, plus 1 for each token or logprob."""
_ENTRY_COST: Final = 8
_FRAME_BYTES: Final = 250
"""Estimated bytes of JSON around a token's text, both in a stream event and in a whole reply."""
_TOP_BYTES: Final = 8
_PROMPT_TOKEN_BYTES: Final = 36
_BUSY = Backoff(1.0, 30.0)
_TOO_LONG = "the request took longer than timeouts.request, including the coordinator's restart"

_log = logging.getLogger(__name__)


class KeptReply:
    """A reply that is computed into a log. If `is_kept` is false, the log drops entries that were read."""

    def __init__(self, context: RequestContext, owner: ReplyCache, *, is_kept: bool = True) -> None:
        self.context = context
        self.is_kept = is_kept
        # None until the reply has begun. See `Reply.acknowledgement`.
        self.acknowledgement: Mapping[str, Any] | None = None
        self.log = AnswerLog(*([self._grow] if is_kept else []), is_held=True)
        # Set when a token arrives that no earlier coordinator recorded, or when the reply has ended.
        self.progressed = asyncio.Event()
        self.held_bytes = 0
        self._content_bytes = 0
        self._owner = owner
        self._view: MakeView | None = None
        self._repeated_entries = 0  # Size of `Reply.repeated`, counted by `entries_of`.
        self._postponed: Callable[[], None] | None = None  # Starts a computation that waits for a reader.
        self._computing = AsyncExitStack()
        self._timer: asyncio.TimerHandle | None = None
        self._beginning: asyncio.Task[None] | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def is_read(self) -> bool:
        return bool(self.log.readers)

    @property
    def is_running(self) -> bool:
        """True unless the reply has ended or is postponed until a client reads it."""
        return not self.log.is_over and self._postponed is None

    @property
    def error(self) -> LlamaclustError | None:
        error = self.log.error
        return error if error is None or isinstance(error, LlamaclustError) else internal_error()

    @property
    def is_retryable(self) -> bool:
        """True if a temporary error ended the reply. False if the coordinator stops: a restart restores the reply."""
        error = self.error
        return error is not None and error.http_status in (503, 504) and not isinstance(error, ClusterStoppingError)

    @property
    def is_evictable(self) -> bool:
        return not self.is_read and not self.is_running

    # -- computation ---------------------------------------------------------------------------------------------------

    def postpone(self, begin: Callable[[], None]) -> None:
        self._postponed = begin
        self.expire_later()

    def resume(self) -> None:
        begin, self._postponed = self._postponed, None
        if begin is not None:
            self._stop_timer()
            begin()

    def start(self, reply: Reply, admitted: bytes | None = None, until_s: float | None = None) -> asyncio.Task[None]:
        """Starts and returns a task. The task submits the request, then waits until the journal has `admitted`, the
        request's body. Closing the reply cancels the task."""
        self._beginning = asyncio.create_task(self._begin_on_disk(reply, admitted, until_s))
        return self._beginning

    async def _begin_on_disk(self, reply: Reply, admitted: bytes | None, until_s: float | None) -> None:
        on_disk = await self.begin(reply, admitted=admitted, until_s=until_s)
        if on_disk is not None:
            await asyncio.shield(on_disk)
        self.log.release()

    async def begin(
        self, reply: Reply, *, admitted: bytes | None = None, until_s: float | None = None
    ) -> asyncio.Future[None] | None:
        """Submits the request. If the cluster is busy, retries until the event loop time `until_s` (None: no retries).
        Returns a future that is done when the journal has `admitted`, the request's body."""
        try:
            await self._submit(reply, until_s, is_recorded=admitted is not None or self.context.is_restored)
            # No `await` may separate this call from the submission.
            on_disk = None if admitted is None else self._owner.admit(self, admitted)
            self.context.images = {}  # The images are encoded, or the journal has them.
        except BaseException as error:
            self._view = reply.view  # It renders the error.
            self.end(_as_ended(error))
            await self._computing.aclose()
            raise
        self._view, self.acknowledgement = reply.view, reply.acknowledgement
        self._repeated_entries = entries_of(reply.repeated)
        if self.is_kept:
            self._task = asyncio.create_task(self._run(reply.is_stored, until_s, on_disk))
            self.expire_later()
        return on_disk

    async def _submit(self, reply: Reply, until_s: float | None, *, is_recorded: bool) -> None:
        clock, failures, request_s = asyncio.get_running_loop().time, count(), self._owner.settings.request_s
        end_s = clock() + request_s - self.context.age_s if until_s is None else until_s
        self._postponed = None
        while not self.log.is_over:
            try:
                preparing = deadline("preparing the request (timeouts.request)", request_s)
                async with preparing:
                    preparing.move(end_s)
                    await self._compute(reply, is_recorded=is_recorded)
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
        self.log.raise_error()
        self._hold(_PROMPT_TOKEN_BYTES * _prompt_tokens(self.log))

    async def _compute(self, reply: Reply, *, is_recorded: bool) -> None:
        """Submits all prompts in one turn of the event loop. If one prompt is refused, none runs."""
        service, computing = reply.service, self._computing
        try:
            requests = [identified(each, self.context, at) for at, each in enumerate(await reply.requests())]
            numbers = {number for request in requests for number, _ in request.adapters}
            self._take_adapters(service.settings.adapters.marks(numbers))
            leases = computing.enter_context(RowLeases())
            generations = [await service.prepare(request, leases) for request in requests]
            computing.enter_context(service.budget.reserve(reply.sizes(requests, generations)))
            self.log.begin(generations, reply.content(is_kept=self.is_kept))
            if is_recorded and (journal := self._owner.journal) is not None:
                Recording(journal, self.context, self.progressed).follow(self.log)
            choices = [await service.choices(*each) for each in zip(requests, generations, strict=True)]
            for prompt, request in enumerate(requests):
                completion = service.submit(request, choices[prompt], self.log, prompt)
                computing.push_async_callback(completion.aclose)
            computing.enter_context(reply.while_computed)
        except BaseException:
            await computing.aclose()
            raise

    def _take_adapters(self, used: tuple[str, ...]) -> None:
        """Stores the adapters of a new request. Raises AdapterUnloadedError if a restored request had others before."""
        if not self.context.is_restored:
            self.context.adapters = used
        elif not {*used} <= {*self.context.adapters}:
            raise AdapterUnloadedError(
                "model: another adapter was loaded under this name meanwhile; send the request again"
            )

    async def _run(self, is_stored: bool, until_s: float | None, on_disk: asyncio.Future[None] | None) -> None:
        try:
            if on_disk is not None:
                await asyncio.shield(on_disk)
            self.log.release()
            async with asyncio.timeout_at(until_s):
                await self.log.wait_over()
            self.log.raise_error()
            if is_stored:
                await self.value()
            if self.context.is_background and (journal := self._owner.journal) is not None:
                passed_s = self.context.admitted.passed_s(Instant.now())
                journal.completed(self.context.id, passed_s + self._owner.settings.background_s)
        except TimeoutError:
            self.end(DeadlineError(_TOO_LONG))
        except LlamaclustError as error:
            self.end(error)
        except Exception:  # noqa: BLE001  An internal error ends only this reply.
            _log.exception("request %s failed", self.context.id)
        finally:
            self.progressed.set()
            await self._computing.aclose()
        self.expire_later()

    def end(self, error: LlamaclustError) -> None:
        self.log.fail(error)
        self.progressed.set()

    def fail(self, error: LlamaclustError) -> None:
        self.end(error)
        self.log.clear()
        self._hold(-self.held_bytes)
        self.expire_later()

    async def aclose(self) -> None:
        """Ends the reply, with an error if it is incomplete, and waits for its tasks."""
        if self._timer is not None:
            self._timer.cancel()
        self.end(RequestCancelledError())
        if self._beginning is not None:  # It may still start the other task.
            self._beginning.cancel()
            await asyncio.wait([self._beginning])
        tasks = [task for task in (self._beginning, self._task) if task is not None]
        self._beginning = self._task = None  # Breaks reference cycles: a task's error refers to this object.
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)  # The log has their errors.
        # A task that is cancelled before its first step does not run its `finally` block.
        await self._computing.aclose()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def expire_later(self) -> None:
        """Starts the timer that removes the reply, unless a client is reading the reply."""
        settings, is_background = self._owner.settings, self.context.is_background
        if not self.is_kept or self.is_read or self._timer is not None or (is_background and self.is_running):
            return
        kept_s = settings.background_s if is_background else settings.resume_s
        self._timer = asyncio.get_running_loop().call_later(kept_s, self._owner.expired, self)

    def _grow(self, prompt: int, chunk: TextChunk) -> None:
        """Counts the bytes of a new chunk. Raises HttpError if the reply becomes too large."""
        packed = self.log.content.storage is RowStorage.PACKED
        rows = len(chunk.rows) + len(chunk.prompt_rows)
        data_bytes = len(chunk.text) + _TOP_BYTES * (chunk.entries - rows)
        self._content_bytes += data_bytes + _FRAME_BYTES * (rows or not packed)
        self._hold(data_bytes + self.log.content.storage.row_bytes * (rows or not packed))
        self.log.raise_error()
        if self.context.is_kept and self._content_bytes > (most := self._owner.settings.max_reply_bytes):
            what = f"the reply is larger than {most >> 20} MiB; lower max_tokens, n or logprobs"
            raise HttpError(500, "reply_too_large", what)

    def _hold(self, more_bytes: int) -> None:
        if self.is_kept:
            self.held_bytes += more_bytes
            self._owner.grew(self, more_bytes)

    # -- readers -------------------------------------------------------------------------------------------------------

    @contextmanager
    def reading(self) -> Iterator[LogReader]:
        """Yields a reader at the start of the log. The reply does not expire while the reader is open."""
        self._stop_timer()
        try:
            with LogReader(self.log) as reader:
                self.resume()
                yield reader
        finally:
            self.expire_later()

    async def stream(self, framing: Framing) -> AsyncGenerator[bytes, None]:
        """Yields the part of the stream that the client has not received. Raises the error that ended the reply."""
        view: View | None = None
        sizes, cost = _Sizes(self._request_entries), 0
        loop, comment = asyncio.get_running_loop(), framing.form.keepalive if framing.with_comments else b""
        # Event loop time of the next comment. If the reply has not begun, its client has waited already.
        comment_s = loop.time() + (0.0 if self._view is None else framing.keepalive_s)
        with self.reading() as reader:
            while (entry := reader.take()) is not None or not reader.is_at_end:
                if comment and loop.time() >= comment_s:  # Entries that show nothing arrive even during a silence.
                    yield comment
                    comment_s = loop.time() + framing.keepalive_s
                    if entry is None:  # More may have arrived while the client took the comment.
                        continue
                if entry is None:
                    await reader.wait(comment_s - loop.time() if comment else None)
                    continue
                view = framing.view = view or self._new_view()
                size = sizes.next(*entry)
                cost += _ENTRY_COST + size
                if cost > _TURN_COST:
                    cost = _ENTRY_COST + size
                    await asyncio.sleep(0)
                if is_large(size):
                    parts = await off_loop_if(True, partial(framing.shown, view, *entry, is_large=True))
                else:
                    parts = framing.shown(view, *entry)
                for part in parts:
                    yield part
                    comment_s = loop.time() + framing.keepalive_s
            if view is None and self._view is not None:
                view = framing.view = self._new_view()
            self.log.raise_error()
            assert view is not None
            for part in framing.parts(view.closing()):
                yield part

    async def acknowledged(self) -> Mapping[str, Any]:
        with self.reading() as reader:
            while self.acknowledgement is None:
                self.log.raise_error()
                await reader.wait()
        return self.acknowledgement

    async def whole(self) -> tuple[JsonBody, int | None]:
        """Returns the JSON of the complete reply, and its length in bytes if the reply is kept."""
        with self.reading():
            await self.log.wait_over()
            parts = self.log.parts()
            if not self.is_kept:
                return self._json(parts), None
            # Rendering the JSON twice takes less memory than keeping it, because clients may read it slowly.
            async with aclosing(self._json(parts)) as counted:
                return self._json(parts), sum([len(part) async for part in counted])

    async def _json(self, parts: Sequence[Sequence[TextChunk]]) -> JsonBody:
        body = json_body(partial(self._new_view().whole, parts), is_large=is_large(self._entries(parts)))
        with self.reading():
            async with aclosing(body):
                async for part in body:
                    yield part

    async def value(self) -> Any:
        parts = self.log.parts()
        return await off_loop_if(is_large(self._entries(parts)), partial(self._new_view().whole, parts))

    def _entries(self, parts: Sequence[Sequence[TextChunk]]) -> int:
        return self._request_entries() + sum(chunk.entries for chunks in parts for chunk in chunks)

    def _request_entries(self) -> int:
        """Counts the prompt's tokens and the values in `Reply.repeated`, because the reply may contain both."""
        return _prompt_tokens(self.log) + self._repeated_entries

    def _new_view(self) -> View:
        assert self._view is not None
        return self._view(self.log)


class _Sizes:
    """Upper bounds on the number of tokens and logprobs to render for each log entry."""

    def __init__(self, request_entries: Callable[[], int]) -> None:
        self._request_entries = request_entries
        self._begun: set[tuple[int, int]] = set()  # Prompt and index of each choice that has begun.
        self._entries = 0  # Number of tokens and logprobs in all chunks so far.

    def next(self, prompt: int, item: LogItem) -> int:
        if not isinstance(item, TextChunk):
            return 0
        self._entries += item.entries
        is_first = (prompt, item.index) not in self._begun
        if not (is_first or item.finish_reason or any(isinstance(event, CallBegun) for event in item.events)):
            return item.entries
        self._begun.add((prompt, item.index))
        return self._entries + self._request_entries()


def _as_ended(error: BaseException) -> LlamaclustError:
    if isinstance(error, LlamaclustError):
        return error
    return internal_error() if isinstance(error, Exception) else RequestCancelledError()


def _prompt_tokens(log: AnswerLog) -> int:
    return sum(len(generation.prompt) for generation in log.generations)

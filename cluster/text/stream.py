"""A running completion: the choices of one request, their events as chunks of text, and their end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Self

from llamaclust.cluster.engine.engine import Engine
from llamaclust.cluster.engine.inbox import Inbox
from llamaclust.cluster.engine.request_stream import RequestStream
from llamaclust.cluster.scheduler.requests import (
    Event,
    Finished,
    GenerationRequest,
    PromptProgress,
    Timings,
    TokenSampled,
)
from llamaclust.cluster.text.answer import TextChunk
from llamaclust.cluster.text.choice import ChoiceText
from llamaclust.cluster.text.request import Answered
from llamaclust.cluster.text.silence import Silence
from llamaclust.core.errors import DeadlineError, QueueFullError, WorkerError
from llamaclust.core.sampling import RowResult

MAX_UNREAD_ROWS = 4096
"""Rows that may wait for a reader beside those that were there when it began."""

_PROGRESS_S = 0.1
"""Between looks at a prompt's progress."""
_QUEUE_S = 120.0
"""How long a later choice waits for a place in a full queue."""


Record = Callable[[int, RowResult], None]
"""Takes a choice's next sampled token."""


class CompletionStream:
    """Chunks of all choices of one request, in the order in which they come. `aclose` ends what still runs.

    Choices behind the first are submitted once the first has computed the prompt, so that they find it in the prefix
    cache; the request counts as accepted by then, so they wait where the queue is full, though not for ever.

    A reader that falls too far behind ends the request, and gets the error after what is there.
    """

    def __init__(
        self,
        engine: Engine,
        generation: GenerationRequest,
        answered: Answered,
        choices: Sequence[ChoiceText],
        on_close: Callable[[CompletionStream], None],
        record: Record | None,
    ) -> None:
        """Submits the first choice; raises what the engine raises."""
        self.generation = generation
        self._engine = engine
        self._answered = answered
        self._on_close = on_close
        self._record = record
        self._chunks: Inbox[TextChunk | BaseException] = Inbox()
        self._unread_rows = 0
        self._most_unread_rows: int | None = None  # None: not read yet, as where prompts are read one by one
        self._unfinished = len(choices)
        self._is_primed = asyncio.Event()
        self._head: TextChunk | None = None
        self._silence = Silence(self._chunks.wake)
        self._choices: list[_FollowedChoice] = []
        self._streams: dict[int, RequestStream] = {}
        self._follow(0, choices[0], engine.submit(replace(generation, answered=answered.get(0, ()))))
        later = range(1, len(choices))
        self._tasks = [asyncio.create_task(self._begin_later(index, choices[index])) for index in later]
        for task in self._tasks:
            task.add_done_callback(self._ended)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.aclose()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> TextChunk:
        """The next chunk; may be cancelled and called again. Raises the error that ended a choice."""
        while (chunk := self._ready()) is None:
            await self._chunks.wait()
        return chunk

    async def next_or_silence(self, idle_s: float) -> TextChunk | None:
        """Likewise; None where nothing came for so long."""
        if (chunk := self._ready()) is not None:
            return chunk
        self._silence.begin(idle_s)
        await self._chunks.wait()
        while (chunk := self._ready()) is None and not self._silence.is_over:
            await self._chunks.wait()
        return chunk

    def _ready(self) -> TextChunk | None:
        """A chunk that is there. StopAsyncIteration after the last one; raises the error that ended a choice."""
        head, self._head = self._head, None
        if head is not None:
            return head
        if self._most_unread_rows is None:
            self._most_unread_rows = self._unread_rows + MAX_UNREAD_ROWS
        if not len(self._chunks):
            if self._unfinished == 0:
                raise StopAsyncIteration
            return None
        item = self._chunks.take()
        if isinstance(item, BaseException):
            raise item
        self._unread_rows -= _rows(item)
        if item.finish_reason is not None:
            self._unfinished -= 1
            self._streams[item.index].abort()  # a stop string's end is soon, and over for who has read it
        return item

    async def wait_first(self, timeout_s: float) -> None:
        """Waits until there is a chunk, that long at most. Raises where the request has failed by then."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                self._head = await anext(self)

    def timings(self, choice: int = 0) -> Timings:
        """Of a choice, as far as it came."""
        return self._streams[choice].timings

    async def progress(self) -> AsyncIterator[PromptProgress]:
        """The prompt's progress until the first chunk is there: first what the prefix cache had, then what is computed
        as that grows. Raises where the request has failed by then."""
        shown: PromptProgress | None = None
        while shown is None or self._head is None:
            await self.wait_first(_PROGRESS_S)
            now = self._streams[0].progress
            if now is not None and shown is None:
                shown = replace(now, processed=now.cached, since_ms=0.0)
                yield shown
            if now is not None and shown is not None and now.processed > shown.processed:
                shown = now
                yield now

    async def aclose(self) -> None:
        """Aborts choices that have not ended. Nothing of the request is left in the engine afterwards."""
        self._silence.end()
        for choice in self._choices:
            choice.is_over = True
        for stream in self._streams.values():
            stream.abort()
        for task in self._tasks:
            task.cancel()
        self._on_close(self)
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _follow(self, index: int, choice: ChoiceText, stream: RequestStream) -> None:
        self._streams[index] = stream
        self._choices.append(_FollowedChoice(self, index, choice, stream))
        stream.follow(self._choices[-1])

    def _ended(self, task: asyncio.Task[None]) -> None:
        error = None if task.cancelled() else task.exception()
        if error is not None:
            self._chunks.put(error)

    async def _begin_later(self, index: int, choice: ChoiceText) -> None:
        await self._is_primed.wait()
        request_id, answered = f"{self.generation.request_id}-{index}", self._answered.get(index, ())
        generation = replace(self.generation, request_id=request_id, choice=index, answered=answered)
        clock = asyncio.get_running_loop().time
        end = clock() + _QUEUE_S
        while True:
            try:
                self._follow(index, choice, self._engine.submit(generation))
                return
            except QueueFullError as full:
                if clock() > end:
                    raise
                await asyncio.sleep(full.retry_after_s)

    # -- called by its choices -------------------------------------------------------------------------------------

    def sampled(self, index: int, row: RowResult) -> None:
        if self._record is not None:
            self._record(index, row)

    def put(self, chunk: TextChunk) -> None:
        """DeadlineError where too much waits for the reader."""
        self._unread_rows += _rows(chunk)
        if self._most_unread_rows is not None and self._unread_rows > self._most_unread_rows:
            for stream in self._streams.values():
                end_soon(stream)
            raise DeadlineError(f"the answer was read too slowly: {self._unread_rows} tokens waited for their reader")
        self._chunks.put(chunk)

    def primed(self) -> None:
        """The first choice has computed the prompt, or has ended."""
        self._is_primed.set()

    def failed(self, error: Exception) -> None:
        self._chunks.put(error)


class _FollowedChoice:
    """Makes text of a choice's events within the engine's work: a task of its own for each choice would take as long
    again for a token."""

    def __init__(self, owner: CompletionStream, index: int, text: ChoiceText, stream: RequestStream) -> None:
        self.is_over = False  # what comes is of no interest
        self._owner = owner
        self._index = index
        self._text = text
        self._stream = stream
        self._has_begun = False

    def take(self, event: Event) -> None:
        """See `Follower`."""
        if self.is_over:
            return
        if not self._has_begun:
            self._has_begun = True
            self._owner.primed()
        try:
            self._take(event)
        except Exception as error:  # noqa: BLE001  a border: the engine's other requests go on
            self.end(error)

    def _take(self, event: Event) -> None:
        owner, text = self._owner, self._text
        if isinstance(event, TokenSampled):
            owner.sampled(self._index, event.row)
        for chunk in text.take(event):
            owner.put(chunk)
        if isinstance(event, Finished):
            self.is_over = True
        elif text.is_stopped:
            self.is_over = True
            end_soon(self._stream)
            owner.put(text.stopped(self._stream.timings))

    def end(self, error: Exception | None) -> None:
        """See `Follower`."""
        if not self.is_over:
            self.is_over = True
            self._owner.primed()
            self._owner.failed(error or WorkerError("the request was ended before its answer was complete"))


def end_soon(stream: RequestStream) -> None:
    """Outside of the engine's work."""
    asyncio.get_running_loop().call_soon(stream.abort)


def _rows(chunk: TextChunk) -> int:
    return len(chunk.rows) + len(chunk.prompt_rows)


async def chunks_or_silence(stream: CompletionStream, idle_s: float) -> AsyncIterator[TextChunk | None]:
    """The stream's chunks; None each time that nothing came for so long."""
    with suppress(StopAsyncIteration):
        while True:
            yield await stream.next_or_silence(idle_s)

"""A running completion: the choices of one request, their events as chunks of text, and their end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Self

from llamaclust.cluster.engine.engine import Engine
from llamaclust.cluster.engine.request_stream import RequestStream
from llamaclust.cluster.scheduler.requests import Finished, GenerationRequest, PromptProgress, Timings, TokenSampled
from llamaclust.cluster.text.answer import TextChunk
from llamaclust.cluster.text.choice import ChoiceText
from llamaclust.cluster.text.request import Answered
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
        self._chunks: asyncio.Queue[TextChunk | BaseException] = asyncio.Queue()
        self._unread_rows = 0
        self._most_unread_rows: int | None = None  # None: not read yet, as where prompts are read one by one
        self._unfinished = len(choices)
        self._is_primed = asyncio.Event()
        self._head: TextChunk | None = None
        self._streams = {0: engine.submit(replace(generation, answered=answered.get(0, ())))}
        self._tasks = [asyncio.create_task(self._run(i, choice)) for i, choice in enumerate(choices)]
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
        head, self._head = self._head, None
        if head is not None:
            return head
        if self._most_unread_rows is None:
            self._most_unread_rows = self._unread_rows + MAX_UNREAD_ROWS
        if self._unfinished == 0 and self._chunks.empty():
            raise StopAsyncIteration
        item = await self._chunks.get()
        if isinstance(item, BaseException):
            raise item
        self._unread_rows -= _rows(item)
        self._unfinished -= item.finish_reason is not None
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
        for stream in self._streams.values():
            stream.abort()
        for task in self._tasks:
            task.cancel()
        self._on_close(self)
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _run(self, index: int, choice: ChoiceText) -> None:
        try:
            await self._follow(self._streams[0] if index == 0 else await self._submit(index), index, choice)
        finally:
            self._is_primed.set()

    def _ended(self, task: asyncio.Task[None]) -> None:
        error = None if task.cancelled() else task.exception()
        if error is not None:
            self._chunks.put_nowait(error)

    async def _submit(self, index: int) -> RequestStream:
        await self._is_primed.wait()
        request_id, answered = f"{self.generation.request_id}-{index}", self._answered.get(index, ())
        generation = replace(self.generation, request_id=request_id, choice=index, answered=answered)
        clock = asyncio.get_running_loop().time
        end = clock() + _QUEUE_S
        while True:
            try:
                stream = self._engine.submit(generation)
            except QueueFullError as full:
                if clock() > end:
                    raise
                await asyncio.sleep(full.retry_after_s)
            else:
                self._streams[index] = stream
                return stream

    async def _follow(self, stream: RequestStream, index: int, choice: ChoiceText) -> None:
        async for event in stream:
            self._is_primed.set()
            if self._record is not None and isinstance(event, TokenSampled):
                self._record(index, event.row)
            for chunk in choice.take(event):
                self._put(chunk)
            if isinstance(event, Finished):
                return
            if choice.is_stopped:
                stream.abort()
                self._chunks.put_nowait(choice.stopped(stream.timings))
                return
        raise WorkerError("the request was ended before its answer was complete")

    def _put(self, chunk: TextChunk) -> None:
        self._unread_rows += _rows(chunk)
        if self._most_unread_rows is not None and self._unread_rows > self._most_unread_rows:
            for stream in self._streams.values():
                stream.abort()
            raise DeadlineError(f"the answer was read too slowly: {self._unread_rows} tokens waited for their reader")
        self._chunks.put_nowait(chunk)


def _rows(chunk: TextChunk) -> int:
    return len(chunk.rows) + len(chunk.prompt_rows)


async def chunks_or_silence(stream: CompletionStream, idle_s: float) -> AsyncIterator[TextChunk | None]:
    """The stream's chunks; None each time that nothing came for so long."""
    while True:
        try:
            async with asyncio.timeout(idle_s):
                chunk = await anext(stream)
        except TimeoutError:
            yield None
        except StopAsyncIteration:
            return
        else:
            yield chunk

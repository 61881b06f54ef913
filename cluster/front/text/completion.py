"""A running completion: the choices of one prompt, whose text goes to a log as it comes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self

from llamaclust.cluster.engine.request_stream import SubmittedRequest
from llamaclust.cluster.front.text.answer import TextChunk
from llamaclust.cluster.front.text.answer_log import AnswerLog, LogReader, Timed
from llamaclust.cluster.front.text.choice import ChoiceText
from llamaclust.cluster.front.text.request import Answered
from llamaclust.cluster.scheduler.requests import Event, Finished, GenerationRequest, PromptProgress
from llamaclust.core.errors import QueueFullError, WorkerError

if TYPE_CHECKING:
    from llamaclust.cluster.engine.engine import Engine

_PROGRESS_S = 0.1
"""Between looks at a prompt's progress."""
_QUEUE_S = 120.0
"""How long a later choice waits for a place in a full queue."""


@dataclass(frozen=True, slots=True)
class TokenizedRequest:
    """A request in tokens, and what makes text of its answers."""

    generation: GenerationRequest
    choices: Sequence[ChoiceText]
    answered: Answered


class Completion:
    """All choices of one prompt, appended to a log in the order in which they come. `aclose` ends what still runs.

    Choices behind the first are submitted once the first has computed the prompt, so that they find it in the prefix
    cache; the request counts as accepted by then, so they wait where the queue is full, though not for ever.

    As an iterator it is the only reader of its log, and gives the chunks. An error ends all choices.
    """

    def __init__(
        self,
        engine: Engine,
        request: TokenizedRequest,
        on_close: Callable[[Completion], None],
        *,
        log: AnswerLog,
        prompt: int = 0,
    ) -> None:
        """Submits the first choice; raises what the engine raises. The log has begun; `prompt`: the index in it."""
        self.generation = request.generation
        self._answered = request.answered
        self._engine = engine
        self._on_close = on_close
        self._log = log
        self._prompt = prompt
        self._reader = LogReader(log)
        self._unfinished = len(request.choices)
        self._is_primed = asyncio.Event()
        self._shows_progress = log.content.with_progress
        self._shown: PromptProgress | None = None
        self._choices = [_Choice(self, index, text, log.content.timed) for index, text in enumerate(request.choices)]
        self._submit(0)
        later = (self._begin_later(index) for index in range(1, len(self._choices)))
        self._tasks = [asyncio.create_task(task) for task in later]
        if self._shows_progress:
            self._tasks.append(asyncio.create_task(self._watch_progress()))
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
        with self._reader:
            while not self._reader.is_at_end:
                if (entry := self._reader.take()) is None:
                    await self._reader.wait()
                elif isinstance(chunk := entry[1], TextChunk):
                    if chunk.finish_reason is not None:
                        self._choices[chunk.index].abort()  # a stop string's end is soon, and over for who has read it
                    return chunk
        self._log.raise_error()
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """Aborts choices that have not ended. Nothing of the request is left in the engine afterwards."""
        for choice in self._choices:
            choice.abort()
        for task in self._tasks:
            task.cancel()
        self._on_close(self)
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _submit(self, index: int) -> None:
        generation = replace(self.generation, answered=self._answered.get(index, ()))
        if index:
            generation = replace(generation, request_id=f"{generation.request_id}-{index}", choice=index)
        self._engine.begin(generation, self._choices[index])

    async def _begin_later(self, index: int) -> None:
        await self._is_primed.wait()
        clock = asyncio.get_running_loop().time
        end = clock() + _QUEUE_S
        while True:
            try:
                self._submit(index)
                return
            except QueueFullError as full:
                if clock() > end:
                    raise
                await asyncio.sleep(full.retry_after_s)

    async def _watch_progress(self) -> None:
        while self._shows_progress:
            self._show_progress()
            await asyncio.sleep(_PROGRESS_S)

    def _show_progress(self) -> None:
        """First what the prefix cache had, then what is computed, as that grows."""
        request = self._choices[0].request
        now = None if request is None else request.progress
        if now is None:
            return
        if self._shown is None:
            self._shown = replace(now, processed=now.cached, since_ms=0.0)
            self._log.append(self._prompt, self._shown)
        if now.processed > self._shown.processed:
            self._shown = now
            self._log.append(self._prompt, now)

    def _ended(self, task: asyncio.Task[None]) -> None:
        error = None if task.cancelled() else task.exception()
        if error is not None:
            self.failed(error)

    # -- called by its choices -------------------------------------------------------------------------------------

    def primed(self) -> None:
        """The first choice has computed the prompt, or has ended."""
        self._is_primed.set()

    def put(self, chunk: TextChunk) -> None:
        """Raises what `AnswerLog.append` raises."""
        if self._shows_progress:  # until the first chunk
            self._shows_progress = False
            self._show_progress()
        self._log.append(self._prompt, chunk)
        if chunk.finish_reason is not None:
            self._unfinished -= 1
            if not self._unfinished:
                self._log.end(self._prompt)

    def failed(self, error: BaseException) -> None:
        for choice in self._choices:
            choice.abort_soon()
        self._log.end(self._prompt, error)


class _Choice:
    """Makes text of a choice's events within the engine's work: a task of its own for each choice would take as long
    again for a token. A `Sink` of the engine."""

    def __init__(self, owner: Completion, index: int, text: ChoiceText, timed: Timed) -> None:
        self.request: SubmittedRequest | None = None
        self._is_over = False  # what comes is of no interest
        self._owner = owner
        self._index = index
        self._text = text
        self._timed = timed
        self._has_begun = False

    def begin(self, request: SubmittedRequest) -> None:
        """See `Sink`."""
        self.request = request

    def take(self, event: Event) -> None:
        """See `Sink`."""
        if self._is_over:
            return
        if not self._has_begun:
            self._has_begun = True
            self._owner.primed()
        try:
            self._take(event)
        except Exception as error:  # noqa: BLE001  a border: the engine's other requests go on
            self.end(error)

    def _take(self, event: Event) -> None:
        for chunk in self._text.take(event):
            self._owner.put(chunk if self._timed is Timed.NEVER else self._with_timings(chunk))
        if isinstance(event, Finished):
            self._is_over = True
        elif self._text.is_stopped:
            assert self.request is not None
            self.abort_soon()
            self._owner.put(self._text.stopped(self.request.timings))

    def _with_timings(self, chunk: TextChunk) -> TextChunk:
        assert self.request is not None
        self._timed = Timed.NEVER if self._timed is Timed.FIRST else self._timed
        return replace(chunk, timings=chunk.timings or self.request.timings)

    def end(self, error: Exception | None) -> None:
        """See `Sink`."""
        if not self._is_over:
            self._is_over = True
            self._owner.primed()
            self._owner.failed(error or WorkerError("the request was ended before its answer was complete"))

    def abort_soon(self) -> None:
        """Ends it outside of the engine's work."""
        self._is_over = True
        if self.request is not None:
            asyncio.get_running_loop().call_soon(self.request.abort)

    def abort(self) -> None:
        self._is_over = True
        if self.request is not None:
            self.request.abort()

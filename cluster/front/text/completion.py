"""A running completion. It converts the events of its choices to text chunks, and appends the chunks to a log."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Self

from llamaclust.cluster.engine.request_stream import SubmittedRequest
from llamaclust.cluster.front.text.answer import TextChunk
from llamaclust.cluster.front.text.answer_log import AnswerLog, Timed
from llamaclust.cluster.front.text.request import AnswerParsing
from llamaclust.cluster.front.text.sharing import when_free
from llamaclust.cluster.front.text.stop_strings import AnswerStops, StopPattern, StopStrings
from llamaclust.cluster.front.text.thought_scanner import thought_scanner
from llamaclust.cluster.scheduler.requests import (
    Event,
    Finished,
    FinishReason,
    GenerationRequest,
    PromptProgress,
    PromptScored,
    Timings,
    TokenSampled,
)
from llamaclust.core.errors import LlamaclustError, WorkerError
from llamaclust.core.sampler.results import RowResult
from llamaclust.model.chat.tools.events import AnswerEvent, ContentText
from llamaclust.model.tokenizers.tokenizer import Detokenizer, Tokenizer

if TYPE_CHECKING:
    from llamaclust.cluster.engine.engine import Engine

_PROGRESS_S = 0.1
_QUEUE_S = 120.0
"""Maximum seconds that each later choice of a prompt waits while the scheduler's queue is full."""
_TURN_TOKENS = 1 << 16
"""Maximum number of prompt tokens to submit in one turn of the event loop. A single choice may have more."""
SCORED_TOKENS = 256
"""Number of scored prompt tokens in a chunk. All chunks except the first begin at a multiple of this number."""


Choice = tuple[GenerationRequest, "ChoiceText"]


class Completion:
    """All choices of one prompt. Appends their chunks to a log. An error in one choice ends all choices."""

    def __init__(
        self, engine: Engine, choices: Sequence[Choice], log: AnswerLog, prompt: int, on_close: Callable[[], None]
    ) -> None:
        """Submits the first choice. Raises the engine's errors. The caller must call `log.begin` first."""
        self.generation = choices[0][0]
        self._engine = engine
        self._on_close = on_close
        self.log = log
        self._prompt = prompt
        self._unfinished = len(choices)
        self._is_primed = asyncio.Event()
        self._shows_progress = log.content.with_progress
        self._shown: PromptProgress | None = None
        self._choices = [_RunningChoice(self, request, text, log.content.timed) for request, text in choices]
        self._tasks: list[asyncio.Task[None]] = []
        try:
            self._submit(self._choices[0])
        except LlamaclustError:
            self._choices.clear()  # Breaks reference cycles: each choice refers to this object.
            raise
        if len(choices) > 1:
            self._tasks.append(asyncio.create_task(self._begin_later()))
        if self._shows_progress:
            self._tasks.append(asyncio.create_task(self._watch_progress()))
        for task in self._tasks:
            task.add_done_callback(self._ended)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Aborts the choices that have not ended, and releases all resources of the request."""
        for choice in self._choices:
            choice.abort()
        for task in self._tasks:
            task.cancel()
        self._on_close()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._choices.clear()  # Breaks reference cycles: each choice refers to this object.
        self._tasks.clear()  # A cancelled task refers to this object through its error.

    def _submit(self, choice: _RunningChoice) -> None:
        self._engine.begin(choice.generation, choice)

    async def _begin_later(self) -> None:
        await self._is_primed.wait()
        together = max(1, _TURN_TOKENS // max(1, len(self.generation.prompt)))
        for number, choice in enumerate(self._choices[1:]):
            if number and number % together == 0:
                await asyncio.sleep(0)
            await when_free(partial(self._submit, choice), _QUEUE_S)

    async def _watch_progress(self) -> None:
        while self._shows_progress:
            self._show_progress()
            await asyncio.sleep(_PROGRESS_S)

    def _show_progress(self) -> None:
        request = self._choices[0].request
        now = None if request is None else request.progress
        if now is None:
            return
        if self._shown is None:
            self._shown = replace(now, processed=now.cached, since_ms=0.0)
            self.log.append(self._prompt, self._shown)
        if now.processed > self._shown.processed:
            self._shown = now
            self.log.append(self._prompt, now)

    def _ended(self, task: asyncio.Task[None]) -> None:
        error = None if task.cancelled() else task.exception()
        if error is not None:
            self.failed(error)

    # -- called by choices ---------------------------------------------------------------------------------------------

    def primed(self) -> None:
        self._is_primed.set()

    def put(self, chunk: TextChunk) -> None:
        if self._shows_progress:  # True until the first chunk.
            self._shows_progress = False
            self._show_progress()
        self.log.append(self._prompt, chunk)
        if chunk.finish_reason is not None:
            self._unfinished -= 1
            if not self._unfinished:
                self.log.end(self._prompt)

    def failed(self, error: BaseException) -> None:
        for task in self._tasks:
            task.cancel()
        for choice in self._choices:
            choice.abort_soon()
        self.log.end(self._prompt, error)


class _RunningChoice:
    """A running choice. The engine calls its methods."""

    def __init__(self, owner: Completion, generation: GenerationRequest, text: ChoiceText, timed: Timed) -> None:
        self.generation = generation
        self.request: SubmittedRequest | None = None
        self._is_over = False  # True if later events are ignored.
        self._owner = owner
        self._text = text
        self._timed = timed
        self._has_begun = False

    def begin(self, request: SubmittedRequest) -> None:
        self.request = request

    def take(self, event: Event) -> None:
        if self._is_over:
            return
        if not self._has_begun:
            self._has_begun = True
            self._owner.primed()
        try:
            self._take(event)
        except Exception as error:  # noqa: BLE001  The engine's other requests must continue.
            self._owner.failed(error)

    def _take(self, event: Event) -> None:
        for chunk in self._text.take(event):
            self._owner.put(chunk if self._timed is Timed.NEVER else self._with_timings(chunk))
        if isinstance(event, Finished):
            self._is_over = True
        elif self._text.is_stopped:
            assert self.request is not None
            self.abort_soon(FinishReason.STOP)
            # The engine may have computed more tokens in the same step.
            timings = replace(self.request.timings, generated_tokens=self._text.tokens)
            self._owner.put(self._text.finished(FinishReason.STOP, timings))

    def _with_timings(self, chunk: TextChunk) -> TextChunk:
        assert self.request is not None
        self._timed = Timed.NEVER if self._timed is Timed.FIRST else self._timed
        return replace(chunk, timings=chunk.timings or self.request.timings)

    def end(self, error: Exception | None) -> None:
        self.request = None  # Breaks a reference cycle: the request refers to this object.
        if not self._is_over:
            self._is_over = True
            self._owner.failed(error or WorkerError("the request was ended before its answer was complete"))

    def abort_soon(self, reason: FinishReason = FinishReason.ABORT) -> None:
        self._is_over = True
        if self.request is not None:
            asyncio.get_running_loop().call_soon(self.request.abort, reason)

    def abort(self) -> None:
        self._is_over = True
        if self.request is not None:
            self.request.abort()


class ChoiceText:
    """Converts the engine's events of one choice to text chunks."""

    def __init__(
        self,
        index: int,
        tokenizer: Tokenizer,
        end_ids: frozenset[int],
        stop: Sequence[StopPattern],
        min_tokens: int,
        reading: AnswerParsing | None = None,
        stop_ids: frozenset[int] = frozenset(),
    ) -> None:
        """`reading` describes how to parse the answer to a chat, and is None for other answers. The engine ends the
        answer at `end_ids`. This object ends it at `stop_ids`, but not in its thoughts."""
        self._index = index
        self._detokenizer = Detokenizer(tokenizer, shown=frozenset() if reading is None else reading.shown_control_ids)
        self._parser = None if reading is None else reading.parser()
        self._end_ids = end_ids
        self._tokenizer = tokenizer
        self._model_ends = tokenizer.end_of_generation
        self._stop_ids = stop_ids
        self._stop: StopStrings | AnswerStops = StopStrings(stop)
        if reading is not None and reading.form.knows_reasoning and (stop or stop_ids):
            self._stop = AnswerStops(stop, thought_scanner(reading))
        self._min_tokens = min_tokens
        self.tokens = 0  # Number of tokens that the engine has delivered.
        self._characters = 0
        self._end_token: int | None = None
        self._stop_token: int | None = None  # The token of `stop_ids` that ended the answer.
        self._scored: list[RowResult] = []  # Rows of prompt tokens that are not in a chunk yet.
        self._scored_start = 0  # Position in the prompt of the first row in `_scored`.

    @property
    def is_stopped(self) -> bool:
        return self._stop.matched is not None or self._stop_token is not None

    def take(self, event: Event) -> Sequence[TextChunk]:
        if isinstance(event, TokenSampled):
            return (*self._rest_of_scores(), self._sampled(event.row))
        if isinstance(event, Finished):
            return (*self._rest_of_scores(), self.finished(event.reason, event.timings))
        return [*self._score(event.start, event.rows)] if isinstance(event, PromptScored) else ()

    def _score(self, start: int, rows: Sequence[RowResult]) -> Iterator[TextChunk]:
        if not self._scored:
            self._scored_start = start
        self._scored += rows
        while len(self._scored) >= (count := SCORED_TOKENS - self._scored_start % SCORED_TOKENS):
            yield self._scores(count)

    def _rest_of_scores(self) -> Sequence[TextChunk]:
        return (self._scores(len(self._scored)),) if self._scored else ()

    def _scores(self, count: int) -> TextChunk:
        chunk = TextChunk(self._index, prompt_start=self._scored_start, prompt_rows=tuple(self._scored[:count]))
        self._scored_start += count
        del self._scored[:count]
        return chunk

    def _sampled(self, row: RowResult) -> TextChunk:
        offset = self._characters
        self.tokens += 1
        text = ""
        if row.token in self._end_ids:
            self._end_token = row.token
        elif self._stops_at(row.token):
            self._stop_token = row.token
        else:
            text = self._shown(self._detokenizer.push(row.token))
        text, events = self._read(text)
        return TextChunk(self._index, text, (row,), (offset,), events=events)

    def _stops_at(self, token: int) -> bool:
        is_stop = token in self._stop_ids and self.tokens > self._min_tokens
        return is_stop and self._stop.takes(self._tokenizer.token_bytes(token).decode(errors="replace"))

    def _shown(self, text: str) -> str:
        self._characters += len(text)
        return self._stop.push(text, may_stop=self.tokens > self._min_tokens)

    def finished(self, reason: FinishReason, timings: Timings) -> TextChunk:
        """Returns the last chunk of the choice. Its finish reason is `reason`, or STOP if a stop string was found."""
        text = self._stop.push(self._detokenizer.flush()) + self._stop.flush()
        text, events = self._read(text, is_last=True)
        stop = self._stop_token if self._stop.matched is None else self._stop.matched
        return TextChunk(
            self._index,
            text,
            finish_reason=reason if stop is None else FinishReason.STOP,
            stopped_by=self._end_token if stop is None else stop,
            timings=timings,
            events=events,
        )

    def _read(self, text: str, *, is_last: bool = False) -> tuple[str, tuple[AnswerEvent, ...]]:
        if self._parser is None:
            return text, ()
        events = self._parser.feed(text) if text else []
        if is_last:
            is_cut = self.is_stopped or self._end_token not in self._model_ends
            events = [*events, *self._parser.end(is_cut=is_cut)]
        return "".join(event.text for event in events if isinstance(event, ContentText)), tuple(events)

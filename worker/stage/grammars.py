"""Grammars of the answers that a last stage samples: one matcher for each, kept between its rows.

A thread of their own compiles grammars when sampling inputs arrive, while the stage computes, and finds what the first
row may choose. For a later row that takes some 10 microseconds, less than to have a thread compute it before; all rows
of a step share a bounded time of the processor. A matcher's state follows from grammar and tokens alone, so an answer
that starts again on another pipeline continues with the same tokens.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from math import nan
from time import thread_time_ns
from typing import TypeVar

from llamaclust.core.errors import LlamaclustError, ProtocolError, RequestError
from llamaclust.core.sampling import AllowedTokens, GrammarRow, GrammarStart, RowResult, RowTask, SampleTask
from llamaclust.model.grammars.matcher import GrammarMatcher
from llamaclust.model.grammars.vocabulary import GrammarVocabulary
from llamaclust.wire.microbatch.messages import SamplingInputs

_READY_S = 60.0
"""Grammars are small enough for a fraction of a second: this is for a machine that is very busy."""
_START_NS = 1_000_000_000
"""Of a processor, to compile a grammar and take in the tokens of before; both are a fraction of that as a rule."""
_TOKEN_NS = 100_000_000
"""Of a processor, for one token; large schemas take a tenth of that."""
_STEP_NS = 200_000_000
"""Of a processor, for all rows of a step: no sign of life waits for more. See _StepTime."""
_TOKENS_AT_ONCE = 64

_Value = TypeVar("_Value")
_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _StepTime:
    """What the rows of one step may still use. Then only rows whose tokens took at most their share go on."""

    share_ns: int
    left_ns: int

    def is_over(self, expected_ns: int) -> bool:
        return self.left_ns <= 0 and expected_ns > self.share_ns


class _Answer:
    """One answer under a grammar. Used by the thread until `ready` is done, then by the stage."""

    def __init__(self) -> None:
        self.ready: Future[None] = Future()
        self.failure: str | None = None  # why the grammar cannot be followed
        self.forced: list[int] = []  # the newest tokens of the matcher: those that had to follow
        self._matcher: GrammarMatcher | None = None
        self._first: list[AllowedTokens | None] = []  # what the first row may choose, until it is asked for
        self._expected_ns = 0  # of the next token, by those before

    def start(self, start: GrammarStart, vocabulary: GrammarVocabulary, *, may_force: bool) -> None:
        """Raises what the matcher raises, and RequestError where it takes too long.

        Tokens are forced at an answer's beginning alone: later ones came with the token before them, or are sampled.
        """
        began_ns = thread_time_ns()
        matcher = self._matcher = GrammarMatcher(start.grammar, vocabulary)
        for place in range(0, len(start.tokens), _TOKENS_AT_ONCE):
            matcher.take(start.tokens[place : place + _TOKENS_AT_ONCE])
            if thread_time_ns() - began_ns > _START_NS:
                raise RequestError(f"the grammar is too complex: its start takes more than {_START_NS / 1e9:g} s")
            if self.failure is not None:  # it was late
                return
        if may_force and not start.tokens:
            self.forced = matcher.forced()
        if not self.forced:
            self._first = [matcher.allowed()]

    def allowed(self, time: _StepTime) -> AllowedTokens | None:
        """What the row may choose; None: all."""
        if self._matcher is None or self.failure is not None or self.forced:
            return None
        return self._first.pop() if self._first else self._bounded(time, self._matcher.allowed)

    def begin(self, row: GrammarRow) -> bool:
        """The row that is sampled now; whether nothing but the answer's end is allowed. ProtocolError for one at
        another place. A row that was sent before its predecessor's forced tokens were known repeats these."""
        if self._matcher is None or self.failure is not None:
            return False
        ahead = self._matcher.position - row.position
        if not 0 <= ahead <= len(self.forced):
            raise ProtocolError(f"answer {row.key} has {self._matcher.position} tokens here, not {row.position}")
        self.forced = self.forced[len(self.forced) - ahead :]
        return self._matcher.is_complete

    def end(self, result: RowResult, time: _StepTime, *, may_force: bool) -> RowResult:
        """Takes in a sampled token; the result with the tokens that must follow, where these are wanted."""
        if self.failure is not None:
            return RowResult(-1, nan, failure=self.failure)
        if self.forced:
            return RowResult(self.forced[0], 0.0, forced=tuple(self.forced[1:]))
        if result.failure is not None or self._matcher is None:
            self.failure = result.failure
            return result
        self._bounded(time, partial(self._take, self._matcher, result.token, may_force=may_force))
        return replace(result, forced=tuple(self.forced))

    def _take(self, matcher: GrammarMatcher, token: int, *, may_force: bool) -> None:
        self.forced = []
        matcher.take((token,))
        if may_force:
            self.forced = matcher.forced()

    def _bounded(self, time: _StepTime, job: Callable[[], _Value]) -> _Value | None:
        """What `job` returns. The grammar's errors are the answer's, which also fails where others would have to wait
        for it."""
        if time.is_over(self._expected_ns):
            self.failure = f"the grammar is too ambiguous: a step's rows take more than {_STEP_NS // 1_000_000} ms"
            return None
        began_ns, value = thread_time_ns(), None
        try:
            value = job()
        except Exception as error:  # noqa: BLE001  a border: one answer fails
            self.failure = _failure(error)
        taken_ns = thread_time_ns() - began_ns
        time.left_ns -= taken_ns
        self._expected_ns = max(taken_ns, self._expected_ns // 2)
        if taken_ns > _TOKEN_NS and self.failure is None:
            self.failure = f"the grammar is too ambiguous: one token takes more than {_TOKEN_NS // 1_000_000} ms"
        return value


class StageGrammars:
    """Of one loaded last stage, in one epoch at a time."""

    def __init__(self, vocabulary: Callable[[], GrammarVocabulary], most: int) -> None:
        """`vocabulary` is read at the first grammar; `most` answers are kept at a time."""
        self._read_vocabulary = vocabulary
        self._vocabulary: GrammarVocabulary | None = None
        self._most = most
        self._answers: dict[int, _Answer] = {}  # by key
        self._starting: dict[tuple[int, int], _Answer] = {}  # by microbatch and key
        self._time = _StepTime(_STEP_NS, _STEP_NS)
        self._thread = ThreadPoolExecutor(1, "grammar")

    def clear(self) -> None:
        """Forgets all answers: another epoch begins."""
        self._answers.clear()
        self._starting.clear()

    def close(self) -> None:
        self.clear()
        self._thread.shutdown(wait=False, cancel_futures=True)

    def receive(self, inputs: SamplingInputs) -> None:
        """Begins to compile what the inputs start. ProtocolError for more than are kept."""
        for _, row in _rows(inputs):
            if row.start is not None:
                if len(self._starting) >= 2 * self._most:
                    raise ProtocolError(f"more than {2 * self._most} grammars that start")
                answer = self._starting[inputs.number, row.key] = _Answer()
                answer.ready = self._thread.submit(self._start, answer, row.start, may_force=row.may_force)

    async def ready(self, inputs: SamplingInputs) -> None:
        """Returns when the grammars that start are compiled; an answer fails where that takes too long."""
        answers = [self._starting.get((inputs.number, row.key)) for _, row in _rows(inputs) if row.start is not None]
        waiting = [answer for answer in answers if answer is not None and not answer.ready.done()]
        if waiting:
            await asyncio.wait([asyncio.wrap_future(answer.ready) for answer in waiting], timeout=_READY_S)
        for answer in waiting:
            if not answer.ready.done() and answer.failure is None:
                answer.failure = f"the grammar was not ready in {_READY_S:g} s"

    def begin(self, inputs: SamplingInputs) -> tuple[tuple[RowTask, ...], list[AllowedTokens | None] | None]:
        """The tasks, and the tokens that each may choose; None where no row has a grammar. Waits for what starts.
        ProtocolError for a row whose grammar is not there."""
        for key in inputs.released:
            self._answers.pop(key, None)
        for number, key in [place for place in list(self._starting) if place[0] <= inputs.number]:
            answer = self._starting.pop((number, key))
            if number == inputs.number:  # earlier ones are of microbatches that failed
                self._answers[key] = answer
        if len(self._answers) > self._most:
            raise ProtocolError(f"grammars of {len(self._answers)} answers, at most {self._most} are kept")
        tasks = list(inputs.tasks)
        allowed: list[AllowedTokens | None] = [None] * len(tasks)
        rows = list(_rows(inputs))
        self._time = _StepTime(_STEP_NS // max(1, len(rows)), _STEP_NS)
        for place, row in rows:
            answer = self._answer(row)
            tasks[place] = _task(tasks[place], ends=answer.begin(row))
            allowed[place] = answer.allowed(self._time)
        return (tuple(tasks), allowed) if rows else (inputs.tasks, None)

    def end(self, inputs: SamplingInputs, rows: tuple[RowResult, ...]) -> tuple[RowResult, ...]:
        """Takes in the sampled tokens; the results, failed where a grammar cannot be followed."""
        results = list(rows)
        for place, row in _rows(inputs):
            results[place] = self._answers[row.key].end(rows[place], self._time, may_force=row.may_force)
        return tuple(results)

    def _answer(self, row: GrammarRow) -> _Answer:
        answer = self._answers.get(row.key)
        if answer is None:
            raise ProtocolError(f"a row of answer {row.key}, whose grammar is not here")
        if answer.failure is None:
            answer.ready.result(_READY_S)
        return answer

    def _start(self, answer: _Answer, start: GrammarStart, *, may_force: bool) -> None:
        """In the thread."""
        try:
            if self._vocabulary is None:
                self._vocabulary = self._read_vocabulary()
            answer.start(start, self._vocabulary, may_force=may_force)
        except Exception as error:  # noqa: BLE001  a border: one answer fails
            answer.failure = _failure(error)


def _failure(error: Exception) -> str:
    if isinstance(error, LlamaclustError):
        return str(error)
    _log.error("a grammar failed", exc_info=error)
    return f"the grammar failed: {type(error).__name__}: {error}"


def _rows(inputs: SamplingInputs) -> Iterator[tuple[int, GrammarRow]]:
    """The output rows with a grammar, and their places."""
    for place, task in enumerate(inputs.tasks):
        if isinstance(task, SampleTask) and task.grammar is not None:
            yield place, task.grammar


def _task(task: RowTask, *, ends: bool) -> RowTask:
    """Where nothing but the end is allowed, the answer ends, whatever is suppressed."""
    return replace(task, suppressed=()) if ends and isinstance(task, SampleTask) and task.suppressed else task

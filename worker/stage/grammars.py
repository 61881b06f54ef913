"""Grammars and budgets of reasoning of the answers that a last stage samples: one matcher for each, kept between its
rows.

A thread of their own compiles grammars when sampling inputs arrive, while the stage computes, and finds what the first
row may choose. A row is sampled as if it had no grammar: mostly its grammar allows the token, which takes a few
microseconds to see. Else all tokens that it allows are computed, and the row is sampled again among these. All rows of
a step share a bounded time of the processor, and another one to build matchers again. A matcher's state follows from
grammar and tokens alone, so an answer that starts again on another pipeline continues with the same tokens.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from math import nan
from time import thread_time_ns

from llamaclust.core.errors import LlamaclustError, ProtocolError, RequestError
from llamaclust.core.sampling import AllowedTokens, GrammarRow, GrammarStart, RowResult, RowTask, SampleTask
from llamaclust.model.grammars.matcher import BUILD_NS, GrammarMatcher
from llamaclust.model.grammars.reasoning_matcher import ReasoningMatcher, answer_matcher
from llamaclust.model.grammars.vocabulary import GrammarVocabulary
from llamaclust.wire.microbatch.messages import SamplingInputs

_READY_S = 60.0
"""Grammars are small enough for a fraction of a second: this is for a machine that is very busy."""
_TOKEN_NS = 100_000_000
"""Of a processor, for one token; large schemas take a tenth of that."""
_STEP_NS = 200_000_000
"""Of a processor, for all rows of a step. A sign of life waits for no more than this and BUILD_NS. See _StepTime."""
_TOKENS_AT_ONCE = 64

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _StepTime:
    """What the rows of one step may still use. Then only rows whose tokens took at most their share go on, and none
    whose matcher must be built again."""

    share_ns: int
    left_ns: int
    build_ns: int  # to build matchers again: once an answer, so others do not pay for it

    def is_over(self, expected_ns: int) -> bool:
        return self.left_ns <= 0 and expected_ns > self.share_ns


class _Answer:
    """One answer under a grammar. Used by the thread until `ready` is done, then by the stage."""

    def __init__(self, start: GrammarStart) -> None:
        self.rule = "the grammar" if start.grammar is not None else "the budget of reasoning"
        self.ready: Future[None] = Future()
        self.failure: str | None = None  # why the grammar cannot be followed
        self.forced: list[int] = []  # the newest tokens of the matcher: those that had to follow
        self._matcher: GrammarMatcher | ReasoningMatcher | None = None
        self._is_refused = False  # the row's token: it is sampled again
        self._may_force = False  # tokens that must follow the row's are wanted with it
        self._expected_ns = 0  # of the next token, by those before

    def start(self, start: GrammarStart, vocabulary: GrammarVocabulary, *, may_force: bool) -> None:
        """Raises what the matcher raises, and RequestError where it takes too long.

        Tokens are forced at an answer's beginning alone: later ones came with the token before them, or are sampled.
        """
        began_ns = thread_time_ns()
        matcher = self._matcher = answer_matcher(start, vocabulary)
        for place in range(0, len(start.tokens), _TOKENS_AT_ONCE):
            matcher.take(start.tokens[place : place + _TOKENS_AT_ONCE])
            if thread_time_ns() - began_ns > BUILD_NS:
                raise RequestError(f"{self.rule} is too complex: its start takes more than {BUILD_NS / 1e9:g} s")
            if self.failure is not None:  # it was late
                return
        if may_force and not start.tokens:
            self.forced = matcher.forced()
        if not self.forced:
            matcher.allowed()  # mostly wanted for the first row

    def begin(self, row: GrammarRow) -> None:
        """The row that is sampled now. ProtocolError for one at another place. A row that was sent before its
        predecessor's forced tokens were known repeats these."""
        self._may_force = row.may_force
        if self._matcher is None or self.failure is not None:
            return
        ahead = self._matcher.position - row.position
        if not 0 <= ahead <= len(self.forced):
            raise ProtocolError(f"answer {row.key} has {self._matcher.position} tokens here, not {row.position}")
        if self.forced:
            self.forced = self.forced[len(self.forced) - ahead :]

    @property
    def is_complete(self) -> bool:
        """Whether nothing but the answer's end, or one forced token, is allowed."""
        return self._matcher is not None and self.failure is None and self._matcher.is_complete

    def take(self, result: RowResult, time: _StepTime) -> RowResult | AllowedTokens:
        """Takes in a sampled token: the result with the tokens that must follow, where these are wanted. Or what the
        row may choose, where its token is not allowed: the next one is chosen among these."""
        if self.failure is None and self.forced:
            return RowResult(self.forced[0], 0.0, forced=tuple(self.forced[1:]))
        self.failure = self.failure or result.failure
        if self.failure is None and (allowed := self._take_within(time, result.token)) is not None:
            return allowed
        if self.failure is not None:
            return RowResult(-1, nan, failure=self.failure)
        return replace(result, forced=tuple(self.forced)) if self.forced else result

    def _take_within(self, time: _StepTime, token: int) -> AllowedTokens | None:
        """The grammar's errors are the answer's, which also fails where others would have to wait for it."""
        if time.is_over(self._expected_ns):
            self.failure = f"{self.rule} costs too much time: a step's rows take more than {_STEP_NS // 1_000_000} ms"
            return None
        assert self._matcher is not None, "it is ready"
        began_ns, allowed, was_costly = thread_time_ns(), None, self._matcher.is_costly
        self._matcher.build_ns = time.build_ns
        try:
            allowed = self._take(self._matcher, token)
        except Exception as error:  # noqa: BLE001  a border: one answer fails
            self.failure = _failure(self.rule, error)
        taken_ns = thread_time_ns() - began_ns
        if self._matcher.is_costly and not was_costly:
            time.build_ns -= taken_ns
            return allowed
        time.left_ns -= taken_ns
        self._expected_ns = max(taken_ns, self._expected_ns // 2)
        if taken_ns > _TOKEN_NS and self.failure is None:
            self.failure = f"{self.rule} costs too much time: one token takes more than {_TOKEN_NS // 1_000_000} ms"
            return None
        return allowed

    def _take(self, matcher: GrammarMatcher | ReasoningMatcher, token: int) -> AllowedTokens | None:
        if self._is_refused:
            matcher.take((token,))
        elif (allowed := matcher.try_take(token)) is not None:
            self._is_refused = True
            return allowed
        self._is_refused = False
        self.forced = matcher.forced() if self._may_force else []
        return None


class StageGrammars:
    """Of one loaded last stage, in one epoch at a time."""

    def __init__(self, vocabulary: Callable[[], GrammarVocabulary], most: int) -> None:
        """`vocabulary` is read at the first grammar; `most` answers are kept at a time."""
        self._read_vocabulary = vocabulary
        self._vocabulary: GrammarVocabulary | None = None
        self._most = most
        self._answers: dict[int, _Answer] = {}  # by key
        self._starting: dict[tuple[int, int], _Answer] = {}  # by microbatch and key
        self._rows: dict[int, _Answer] = {}  # of the step: the output rows with a grammar, by place
        self._time = _StepTime(_STEP_NS, _STEP_NS, BUILD_NS)
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
                answer = self._starting[inputs.number, row.key] = _Answer(row.start)
                answer.ready = self._thread.submit(self._start, answer, row.start, may_force=row.may_force)

    async def ready(self, inputs: SamplingInputs) -> None:
        """Returns when the grammars that start are compiled; an answer fails where that takes too long."""
        answers = [self._starting.get((inputs.number, row.key)) for _, row in _rows(inputs) if row.start is not None]
        waiting = [answer for answer in answers if answer is not None and not answer.ready.done()]
        if waiting:
            await asyncio.wait([asyncio.wrap_future(answer.ready) for answer in waiting], timeout=_READY_S)
        for answer in waiting:
            if not answer.ready.done() and answer.failure is None:
                answer.failure = f"{answer.rule} was not ready in {_READY_S:g} s"

    def begin(self, inputs: SamplingInputs) -> tuple[RowTask, ...]:
        """The tasks as they are sampled. Waits for what starts. ProtocolError for a row whose grammar is not there."""
        for key in inputs.released:
            self._answers.pop(key, None)
        self._admit(inputs.number)
        self._rows = {place: self._begun(row) for place, row in _rows(inputs)}
        if not self._rows:
            return inputs.tasks
        self._time = _StepTime(_STEP_NS // len(self._rows), _STEP_NS, BUILD_NS)
        tasks = list(inputs.tasks)
        for place, answer in self._rows.items():
            task = tasks[place]
            if isinstance(task, SampleTask) and task.suppressed and answer.is_complete:
                tasks[place] = replace(task, suppressed=())  # nothing else may follow, whatever is suppressed
        return tuple(tasks)

    def take(self, rows: tuple[RowResult, ...]) -> tuple[list[RowResult], dict[int, AllowedTokens]]:
        """Takes in the step's sampled tokens: the results, failed where a grammar cannot be followed; and by place,
        what rows may choose whose token is not allowed: they are sampled again among these."""
        results, refused = list(rows), dict[int, AllowedTokens]()
        for place, answer in self._rows.items():
            taken = answer.take(rows[place], self._time)
            if isinstance(taken, RowResult):
                results[place] = taken
            else:
                refused[place] = taken
        return results, refused

    def take_again(self, place: int, result: RowResult) -> RowResult:
        """Takes in the token of a row that was sampled again."""
        taken = self._rows[place].take(result, self._time)
        assert isinstance(taken, RowResult), "its token was chosen among those that are allowed"
        return taken

    def _admit(self, number: int) -> None:
        """What starts in this microbatch; earlier ones are of microbatches that failed."""
        for place in [place for place in self._starting if place[0] <= number]:
            answer = self._starting.pop(place)
            if place[0] == number:
                self._answers[place[1]] = answer
                if answer.failure is None:
                    answer.ready.result(_READY_S)
        if len(self._answers) > self._most:
            raise ProtocolError(f"grammars of {len(self._answers)} answers, at most {self._most} are kept")

    def _begun(self, row: GrammarRow) -> _Answer:
        answer = self._answers.get(row.key)
        if answer is None:
            raise ProtocolError(f"a row of answer {row.key}, whose grammar is not here")
        answer.begin(row)
        return answer

    def _start(self, answer: _Answer, start: GrammarStart, *, may_force: bool) -> None:
        """In the thread."""
        try:
            if self._vocabulary is None:
                self._vocabulary = self._read_vocabulary()
            answer.start(start, self._vocabulary, may_force=may_force)
        except Exception as error:  # noqa: BLE001  a border: one answer fails
            answer.failure = _failure(answer.rule, error)


def _failure(rule: str, error: Exception) -> str:
    if isinstance(error, LlamaclustError):
        return str(error)
    _log.error("%s failed", rule, exc_info=error)
    return f"{rule} failed: {type(error).__name__}: {error}"


def _rows(inputs: SamplingInputs) -> Iterator[tuple[int, GrammarRow]]:
    """The output rows with a grammar, and their places."""
    for place, task in enumerate(inputs.tasks):
        if isinstance(task, SampleTask) and task.grammar is not None:
            yield place, task.grammar

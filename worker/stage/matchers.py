"""Matchers apply grammars and reasoning budgets to answers at the last stage. Threads, which clients share, make
matchers when sampling inputs arrive. A row whose matcher is not ready is deferred, and the coordinator sends it
again."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, wait
from functools import partial
from threading import Lock
from typing import Final

from llamaclust.core.errors import ProtocolError
from llamaclust.core.sampler.matchers import AllowedTokens
from llamaclust.core.sampler.results import RowResult
from llamaclust.core.sampler.tasks import MatcherRow
from llamaclust.core.sharing.fair_threads import FairThreads
from llamaclust.kernels._native import SamplingTasks
from llamaclust.model.grammars.vocabulary import GrammarVocabulary
from llamaclust.worker.stage.dependencies import MOST_IN_FLIGHT
from llamaclust.worker.stage.matched_answer import DEFERRED, MatchedAnswer, MatcherTime
from llamaclust.worker.stage.step_inputs import StepInputs

_THREADS: Final = 2
"""Number of threads that make matchers. With two, no client waits for another client's large grammar."""
_ALONE_S: Final = 0.05
"""Maximum wait in seconds if no row of the step is ready."""
_FIRST_S: Final = 0.01
"""Maximum wait in seconds for rows that have not been deferred yet, if other rows are ready."""


class StageMatchers:
    """The matchers of one epoch. `receive` and `ready` run on the event loop, and `begin` and `take` on a thread."""

    def __init__(self, vocabulary: Callable[[], GrammarVocabulary], most: int) -> None:
        """`vocabulary` is called once, by `prepare` or for the first matcher. `most` limits the number of answers."""
        self._read_vocabulary = vocabulary
        self._reading = Lock()  # Held while the vocabulary is read.
        self._vocabulary: GrammarVocabulary | None = None
        self._most = most
        self._lock = Lock()  # Protects `_answers` and `_changes`.
        self._answers: dict[int, MatchedAnswer] = {}
        # Changes that later steps apply, by (microbatch, key). None releases the answer.
        self._changes: dict[tuple[int, int], MatchedAnswer | None] = {}
        # The current step's rows of each answer, as (row index in the step, row).
        self._rows: dict[MatchedAnswer, deque[tuple[int, MatcherRow]]] = {}
        self._deferred: list[int] = []  # Indices of the step's rows that must be computed again.
        self._last: dict[MatchedAnswer, int] = {}  # Index of the step's last row that gave the answer a token.
        self._time = MatcherTime()
        self._threads = FairThreads(_THREADS, "matchers")

    def clear(self) -> None:
        with self._lock:
            for answer in (*self._answers.values(), *filter(None, self._changes.values())):
                answer.is_released = True
            self._answers.clear()
            self._changes.clear()

    def close(self) -> None:
        self.clear()
        self._threads.close()
        self._vocabulary = None

    @property
    def has_vocabulary(self) -> bool:
        return self._vocabulary is not None

    def prepare(self) -> Future[None]:
        """Reads the vocabulary before an answer needs it. A large vocabulary takes more than a second, and in part
        blocks all other threads."""
        return self._threads.submit(0, 0, self._prepare)

    def receive(self, inputs: StepInputs) -> None:
        """Drops the matchers of released answers, and starts new matchers. Raises ProtocolError if too many start."""
        number = inputs.tasks.number
        for key in inputs.tasks.released:
            if (answer := self._find(number, key)) is not None:
                answer.is_released = True
                with self._lock:
                    self._changes[number, key] = None
        if not inputs.starts:
            return
        starts = {(number, start.key): MatchedAnswer(start) for start in inputs.starts}
        with self._lock:
            self._changes |= starts
            starting = sum(answer is not None for answer in self._changes.values())
        if starting > MOST_IN_FLIGHT * self._most:
            raise ProtocolError(f"more than {MOST_IN_FLIGHT * self._most} grammar matchers are starting")
        for answer in starts.values():
            self._make(answer)

    async def ready(self, tasks: SamplingTasks) -> None:
        """Waits a short time for the step's matchers to be ready. A longer wait would delay rows without matchers."""
        making, timeout_s = self._awaited(tasks)
        if making:
            await asyncio.wait(list(map(asyncio.wrap_future, making)), timeout=timeout_s)

    def wait_ready(self, tasks: SamplingTasks) -> None:
        making, timeout_s = self._awaited(tasks)
        wait(making, timeout_s)

    def _awaited(self, tasks: SamplingTasks) -> tuple[list[Future[None]], float]:
        answers = [self._find(tasks.number, key) for _, key, *_ in tasks.matcher_rows]
        late = [answer for answer in answers if not (answer is None or answer.is_released or answer.ready.done())]
        first = [answer for answer in late if not answer.is_waited_for]
        is_alone = len(late) == tasks.rows
        return [answer.ready for answer in (late if is_alone else first)], _ALONE_S if is_alone else _FIRST_S

    def begin(self, tasks: SamplingTasks) -> list[int]:
        """Begins a step. Returns the indices of rows whose answer is complete. Raises ProtocolError."""
        with self._lock:
            self._admit(tasks.number)
        self._rows, self._deferred, self._last = {}, [], {}
        complete: list[int] = []
        for place, key, position, drafted in tasks.matcher_rows:
            row = MatcherRow(key, position, drafted)
            if (answer := self._answers.get(row.key)) is None:
                raise ProtocolError(f"the matcher of answer {row.key} is missing on this worker")
            if (row.drafted is None) == (answer in self._rows):
                raise ProtocolError(
                    f"answer {row.key} must have one row without a drafted token, before its drafted rows"
                )
            if row.drafted is not None:
                self._rows[answer].append((place, row))
            elif answer.begin(row):
                self._rows[answer] = deque([(place, row)])
                complete += [place] if answer.is_complete else []
            else:
                self._deferred.append(place)
                self._rows[answer] = deque(maxlen=0)  # The answer's drafted rows are deferred too.
        self._rows = dict(sorted(self._rows.items(), key=lambda item: item[0].turn))
        self._time = MatcherTime()
        return complete

    def take(self, results: list[RowResult]) -> dict[int, AllowedTokens]:
        """Feeds the step's tokens to the matchers, which may replace tokens in `results`. Returns the allowed tokens of
        each refused row. The caller samples these rows again and calls `take` until it returns {}."""
        for place in self._deferred:
            results[place] = DEFERRED
        refused: dict[int, AllowedTokens] = {}
        for is_drafted in (False, True):  # No answer waits for the drafted rows of another answer.
            for answer, rows in self._rows.items():
                while rows and (rows[0][1].drafted is not None) is is_drafted and rows[0][0] not in refused:
                    self._take_first(answer, rows, results, refused)
        for answer, place in () if refused else self._last.items():
            results[place] = answer.with_forced_draft(results[place], self._time)
        return refused

    def _take_first(
        self,
        answer: MatchedAnswer,
        rows: deque[tuple[int, MatcherRow]],
        results: list[RowResult],
        refused: dict[int, AllowedTokens],
    ) -> None:
        place, row = rows[0]
        if row.drafted is not None and not answer.has_drafted(row):
            rows.clear()
            return
        taken = self._take(answer, row, results[place])
        if not isinstance(taken, RowResult):
            refused[place] = taken
            return
        results[place] = taken
        rows.popleft()
        if taken is DEFERRED:
            rows.clear()
            self._last.pop(answer, None)  # The answer's matcher may be in the making again.
        else:
            self._last[answer] = place

    def _take(self, answer: MatchedAnswer, row: MatcherRow, result: RowResult) -> RowResult | AllowedTokens:
        is_new = row.drafted is not None and not answer.is_refused
        if is_new and not (self._time.may_draft and answer.begin(row)):
            return DEFERRED
        taken = answer.take(result, self._time)
        if taken is DEFERRED and not answer.ready.done():
            self._make(answer)
        return taken

    def _find(self, number: int, key: int) -> MatchedAnswer | None:
        with self._lock:
            changes = [change for change in self._changes if change[0] <= number and change[1] == key]
            return self._changes[max(changes)] if changes else self._answers.get(key)

    def _admit(self, number: int) -> None:
        """Executes the requests to add or remove matchers that came before microbatch `number` or with it."""
        for change in list(self._changes):
            if change[0] <= number:
                if (answer := self._changes.pop(change)) is None:
                    self._answers.pop(change[1], None)
                else:
                    self._answers[change[1]] = answer
        if len(self._answers) > self._most:
            raise ProtocolError(f"{len(self._answers)} answers have grammar matchers; the limit is {self._most}")

    def _make(self, answer: MatchedAnswer) -> None:
        answer.ready = self._threads.submit(answer.owner, answer.size, partial(answer.make_matcher, self._prepare))

    def _prepare(self) -> GrammarVocabulary:
        with self._reading:
            vocabulary = self._vocabulary
            if vocabulary is None:
                vocabulary = self._vocabulary = self._read_vocabulary()
                vocabulary.native  # noqa: B018  builds the native vocabulary
            return vocabulary

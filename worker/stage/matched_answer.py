"""One answer at the last stage, with its matcher, which knows what tokens a grammar or a reasoning budget allows."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from math import nan
from time import monotonic, thread_time_ns
from typing import Final

from llamaclust.core.errors import DeadlineError, LlamaclustError, ProtocolError, RequestError
from llamaclust.core.sampler.matchers import AllowedTokens, MatcherStart
from llamaclust.core.sampler.results import RowResult
from llamaclust.core.sampler.tasks import MatcherRow
from llamaclust.model.grammars.matcher import GrammarMatcher, LexerUsedUpError, TokenRefusedError
from llamaclust.model.grammars.reasoning_matcher import ReasoningMatcher, answer_matcher
from llamaclust.model.grammars.vocabulary import GrammarVocabulary

_DRAFTED_NS: Final = 200_000_000
"""Once the matchers of a step have used this CPU time, the remaining drafted rows are deferred."""
_STEP_NS: Final = 500_000_000
"""Once a step's matchers have used this CPU time, all other rows with matchers are deferred to later steps."""
_TOLD_NS: Final = 1_000_000
"""Minimum CPU time of a row's matcher that is reported to the coordinator."""
_READY_S: Final = 60.0
"""Time limit for making a matcher, which takes a fraction of a second unless the machine is very busy."""
_TOKEN_NS: Final = 50_000_000
"""CPU time allowed per token. Large schemas take at most a tenth of it."""
_GUARD_NS: Final = 2_000_000_000
"""CPU time that an answer may use beyond `_TOKEN_NS` per token. The limits in matcher.py normally apply earlier."""
_TOKENS_AT_ONCE: Final = 64
_TOKEN_CHARACTERS: Final = 16
"""Characters of a grammar that compile in the time in which a matcher takes a token."""

DEFERRED: Final = RowResult(-1, nan, is_deferred=True)

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class MatcherTime:
    taken_ns: int = 0

    @property
    def may_draft(self) -> bool:
        return self.taken_ns < _DRAFTED_NS

    @property
    def is_used_up(self) -> bool:
        return self.taken_ns >= _STEP_NS


class MatchedAnswer:
    """An answer with a matcher. The thread that makes the matcher owns the answer until `ready` is done."""

    def __init__(self, start: MatcherStart) -> None:
        self.owner = start.owner
        self.ready: Future[None] = Future()
        self.is_released = False  # True if no matcher needs to be made any more.
        self._due: int | None = None  # Position of a deferred row that must come again.
        self._begun_s: float | None = None
        self._failed: RowResult | None = None  # Result of all further rows after a failure.
        self._start = start
        self._tokens = list(start.tokens)  # Tokens that the matcher has accepted.
        self._matcher: GrammarMatcher | ReasoningMatcher | None = None
        self._forced: list[int] = []  # Tokens at the end of `_tokens` that the grammar dictated.
        self.is_refused = False  # True if the row's token was refused and is sampled again.
        self._is_costly = False
        self._excess_ns = 0  # CPU time used beyond `_TOKEN_NS` per token.
        self._row_ns = _TOLD_NS  # CPU time of the newest row. The first row counts as slow.
        self._held = 0  # Number of consecutive steps that had no time left for the answer.

    # -- the threads that make matchers ----------------------------------------------------------------------------

    @property
    def size(self) -> int:
        """An estimate of the time to make the matcher, in characters of a grammar."""
        grammar = self._start.grammar
        return (0 if grammar is None else len(grammar.definition)) + _TOKEN_CHARACTERS * len(self._tokens)

    def make_matcher(self, read_vocabulary: Callable[[], GrammarVocabulary]) -> None:
        """Makes a matcher and feeds it the answer's tokens. An error fails only this answer."""
        self._matcher, self._begun_s = None, monotonic()
        if self.is_released:
            return
        try:
            vocabulary = read_vocabulary()
            try:
                self._make_matcher(vocabulary)
            except LexerUsedUpError:
                self._is_costly = True
                self._make_matcher(vocabulary)
        except Exception as error:  # noqa: BLE001  only this answer fails
            self.fail(error)

    def _make_matcher(self, vocabulary: GrammarVocabulary) -> None:
        """Makes the matcher. If the answer is empty, adds the tokens that the grammar forces at its beginning."""
        matcher, tokens = answer_matcher(self._start, vocabulary, is_costly=self._is_costly), self._tokens
        self._excess_ns = 0
        for place in range(0, len(tokens), _TOKENS_AT_ONCE):
            began_ns = thread_time_ns()
            matcher.take(tokens[place : place + _TOKENS_AT_ONCE])
            self._charge(thread_time_ns() - began_ns, _TOKENS_AT_ONCE)
            if self.is_released or self._failed is not None:  # The answer was released or failed meanwhile.
                return
        began_ns = thread_time_ns()
        if self._start.may_force and not tokens:
            self._forced = matcher.forced()
            self._tokens += self._forced
        if not self._forced:
            matcher.allowed()  # Computed in advance, because the first row will probably need it.
        self._charge(thread_time_ns() - began_ns, len(self._forced) + 1)
        self._matcher = matcher

    # -- the stage -------------------------------------------------------------------------------------------------

    @property
    def rule(self) -> str:
        return "the budget of reasoning" if self._start.grammar is None else "the grammar"

    @property
    def is_waited_for(self) -> bool:
        return self._due is not None

    def begin(self, row: MatcherRow) -> bool:
        """Begins a row. Returns False if the row is deferred. Raises ProtocolError for a wrong position."""
        if self._due is not None and row.position > self._due:
            return False
        is_ready = self.ready.done() and self._matcher is not None
        if not is_ready and self._failed is None:
            self._due = row.position
            if self._begun_s is None or monotonic() - self._begun_s < _READY_S:
                return False
            self._failed = RowResult(-1, nan, failure=f"{self.rule} was not ready in {_READY_S:g} s")
        if self._failed is not None:
            return True
        ahead = len(self._tokens) - row.position
        if not 0 <= ahead <= len(self._forced):
            raise ProtocolError(
                f"answer {row.key} has {len(self._tokens)} tokens on this worker, expected {row.position}"
            )
        self._due = None
        if self._forced:
            self._forced = self._forced[len(self._forced) - ahead :]
        return True

    @property
    def turn(self) -> tuple[bool, int]:
        """The sort key of a step's answers. Fast answers come first. Among equals, more deferrals come first."""
        return self._is_slow, -self._held

    @property
    def _is_slow(self) -> bool:
        return self._row_ns >= _TOLD_NS

    def has_drafted(self, row: MatcherRow) -> bool:
        return 0 < row.position <= len(self._tokens) and self._tokens[row.position - 1] == row.drafted

    @property
    def is_complete(self) -> bool:
        return self._matcher is not None and self._failed is None and self._matcher.is_complete

    def take(self, result: RowResult, time: MatcherTime) -> RowResult | AllowedTokens:
        """Feeds a sampled token to the matcher. Returns the result with forced tokens, or DEFERRED if the step has no
        time left. If the token is refused, returns the allowed tokens, from which the caller must sample again."""
        if self._failed is None and self._forced:
            return RowResult(self._forced[0], 0.0, forced=tuple(self._forced[1:]))
        if self._failed is None and result.failure is not None:
            self._failed = result
        if self._failed is None and time.is_used_up and not self.is_refused:
            self._due = len(self._tokens)
            self._held += 1
            return DEFERRED
        self._held = 0
        if self._failed is None:
            try:
                if (allowed := self._take_timed(time, result.token)) is not None:
                    return allowed
            except LexerUsedUpError:
                return self._defer()
            except Exception as error:  # noqa: BLE001  only this answer fails
                self.fail(error)
        if self._failed is not None:
            return self._failed
        if not self._forced and not self._is_slow:
            return result
        return replace(result, forced=tuple(self._forced), matcher_ns=self._row_ns if self._is_slow else 0)

    def with_forced_draft(self, result: RowResult, time: MatcherTime) -> RowResult:
        if not self._start.drafts_forced or self._failed is not None or self._matcher is None or not time.may_draft:
            return result
        began_ns = thread_time_ns()
        try:
            forced = self._matcher.peek_forced()
            taken_ns = thread_time_ns() - began_ns
            time.taken_ns += taken_ns
            self._charge(taken_ns, 0)  # The row's token was charged when the matcher accepted it.
        except RequestError:
            return result  # The answer's next row handles the same error.
        except Exception as error:  # noqa: BLE001  only this answer fails, at its next row
            self.fail(error)
            return result
        if not forced and taken_ns < _TOLD_NS:
            return result
        row_ns = result.matcher_ns + taken_ns
        return replace(result, forced_draft=tuple(forced), matcher_ns=row_ns if row_ns >= _TOLD_NS else 0)

    def fail(self, error: Exception) -> None:
        """Fails the answer. A RequestError, except TokenRefusedError, counts as the request's own fault."""
        message = str(error)
        is_fault = isinstance(error, RequestError) and not isinstance(error, TokenRefusedError)
        if not isinstance(error, LlamaclustError):
            _log.error("%s failed", self.rule, exc_info=error)
            message = f"{self.rule} failed: {type(error).__name__}: {error}"
        self._failed = RowResult(-1, nan, failure=message, is_request_fault=is_fault)

    def _defer(self) -> RowResult:
        self._is_costly, self.is_refused = True, False
        self.ready, self._begun_s = Future(), None
        self._due = len(self._tokens)
        return DEFERRED

    def _take_timed(self, time: MatcherTime, token: int) -> AllowedTokens | None:
        before_ns = self._row_ns if self.is_refused else 0
        began_ns = thread_time_ns()
        allowed = self._take(token)
        taken_ns = thread_time_ns() - began_ns
        time.taken_ns += taken_ns
        self._row_ns = before_ns + taken_ns
        self._charge(taken_ns, 1)
        return allowed

    def _charge(self, taken_ns: int, tokens: int) -> None:
        self._excess_ns = max(0, self._excess_ns + taken_ns - tokens * _TOKEN_NS)
        if self._excess_ns > _GUARD_NS:
            most = f"{_ms(_TOKEN_NS)} ms of processor time"
            raise DeadlineError(f"{self.rule} is too slow to follow: a token takes more than {most}; try again")

    def _take(self, token: int) -> AllowedTokens | None:
        matcher = self._matcher
        assert matcher is not None, "it is ready"
        if self.is_refused:
            matcher.take((token,))
        elif (allowed := matcher.try_take(token)) is not None:
            self.is_refused = True
            return allowed
        self.is_refused = False
        self._forced = matcher.forced() if self._start.may_force else []
        self._tokens += (token, *self._forced)
        return None


def _ms(ns: int) -> int:
    return ns // 1_000_000

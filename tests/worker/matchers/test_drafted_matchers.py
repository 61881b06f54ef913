"""Tests of drafted rows of answers with a matcher: the matcher takes each row's token only after the rows before it
were accepted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from llamaclust.core.sampler.matchers import AllowedTokens
from llamaclust.core.sampler.tasks import MatcherRow
from llamaclust.model.grammars import definitions
from llamaclust.model.grammars.matcher import GrammarMatcher, LexerUsedUpError
from llamaclust.worker.stage import matched_answer
from llamaclust.worker.stage.matched_answer import MatchedAnswer
from llamaclust.worker.stage.matchers import StageMatchers
from support.chat.matching import ABC, VOCABULARY, Task, begin, inputs_of, sampled, step, taken, task

ABCDEF = definitions.of_regex("[ab]bcde[fg]", "guided_regex")


@pytest.fixture
def stage() -> Iterator[StageMatchers]:
    made = StageMatchers(lambda: VOCABULARY, most=3)
    yield made
    made.close()


def drafted(key: int, place: int, letter: str) -> Task:
    """Returns the row at this place of the answer; its own token was drafted."""
    row = task(key, place).row
    return Task(replace(row, matcher=MatcherRow(key, place, ord(letter))), None)


def _second_is_used_up(
    try_take: Callable[[GrammarMatcher, int], AllowedTokens | None],
) -> Callable[[GrammarMatcher, int], AllowedTokens | None]:
    def take(matcher: GrammarMatcher, token: int) -> AllowedTokens | None:
        if matcher.position and not matcher._is_costly:
            raise LexerUsedUpError("used up")
        return try_take(matcher, token)

    return take


def test_each_row_goes_on_with_what_the_one_before_it_chose(stage: StageMatchers) -> None:
    allowed, rows = step(stage, 0, task(1, 0, ABC), drafted(1, 1, "a"), drafted(1, 2, "c"), says="acd")
    assert not allowed and rows == tuple(map(sampled, "acd"))
    assert step(stage, 1, task(1, 3), says=".", refused="!")[0] == [{"."}], "three tokens were taken in"


def test_a_row_behind_another_token_is_not_taken_in(stage: StageMatchers) -> None:
    begin(stage, inputs_of(0, task(1, 0, ABC), drafted(1, 1, "b"), drafted(1, 2, "c")))
    results, refused = taken(stage, map(sampled, "ax!"))
    assert not refused and results == [sampled(letter) for letter in "ax!"], "rows that do not count stay as they are"
    assert step(stage, 1, task(1, 1), says="c", refused="!")[0] == [{"c"}]


def test_rows_are_sampled_again_one_after_the_other(stage: StageMatchers) -> None:
    """Each row is sampled from the tokens that its grammar allows after the previous row; other answers' rows
    continue."""
    begin(stage, inputs_of(0, task(1, 0, ABC), drafted(1, 1, "b"), drafted(1, 2, "c"), task(2, 0, ABC)))
    results = [sampled(letter) for letter in "!!!a"]
    allowed = stage.take(results)
    assert set(allowed) == {0}
    results[0] = sampled("b")
    assert set(stage.take(results)) == {1}
    results[1] = sampled("c")
    assert set(stage.take(results)) == {2}
    results[2] = sampled("e")
    assert stage.take(results) == {}
    assert results == [sampled(letter) for letter in "bcea"]


def test_a_refused_row_is_sampled_again_when_no_time_is_left_for_drafted_ones(
    stage: StageMatchers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A deferred row would take its refused token, here the end of the answer, unchecked in the next step."""
    spent_ns, take = [0], MatchedAnswer._take

    def timed(answer: MatchedAnswer, token: int) -> AllowedTokens | None:
        spent_ns[0] += matched_answer._DRAFTED_NS if answer._tokens else 0
        return take(answer, token)

    monkeypatch.setattr(matched_answer, "thread_time_ns", lambda: spent_ns[0])
    monkeypatch.setattr(MatchedAnswer, "_take", timed)
    begin(stage, inputs_of(0, task(1, 0, ABC), drafted(1, 1, "a"), drafted(1, 2, "c")))
    results, refused = taken(stage, map(sampled, "a.d"))
    assert set(refused) == {1}
    results[1] = sampled("c")
    assert stage.take(results) == {}
    assert [row.token for row in results[:2]] == [*b"ac"] and results[2].is_deferred
    assert step(stage, 1, task(1, 2), says="e", refused=".")[0] == [set("de")]


def test_forced_tokens_are_repeated_by_drafted_rows(stage: StageMatchers) -> None:
    """A drafted row repeats forced tokens, like a row that was sent before they were known."""
    begin(stage, inputs_of(0, task(1, 0, ABC, may_force=True), drafted(1, 1, "a"), drafted(1, 2, "c")))
    results, refused = taken(stage, map(sampled, "axd"))
    assert not refused
    assert [(row.token, row.forced) for row in results] == [(ord("a"), (ord("c"),)), (ord("c"), ()), (ord("d"), ())]
    assert step(stage, 1, task(1, 3), says=".", refused="!")[0] == [{"."}]


def test_a_draft_that_differs_from_forced_tokens_does_not_count(stage: StageMatchers) -> None:
    begin(stage, inputs_of(0, task(1, 0, ABC, may_force=True), drafted(1, 1, "a"), drafted(1, 2, "x")))
    results, refused = taken(stage, map(sampled, "azd"))
    assert not refused and results[2] == sampled("d")
    assert step(stage, 1, task(1, 2), says="e", refused="!")[0] == [set("de")]


def test_the_last_row_that_counts_has_a_forced_draft(stage: StageMatchers) -> None:
    """The matcher's state does not include the tokens of a draft."""
    begin(stage, inputs_of(0, task(1, 0, ABCDEF, drafts_forced=True), drafted(1, 1, "a"), drafted(1, 2, "x")))
    results, refused = taken(stage, map(sampled, "abz"))
    assert not refused
    assert results == [sampled("a"), replace(sampled("b"), forced_draft=(*b"cde",)), sampled("z")]
    assert step(stage, 1, task(1, 2), drafted(1, 3, "c"), says="cd", refused="!d")[0] == [{"c"}]
    assert step(stage, 2, task(1, 4), says="e", refused="!")[0] == [{"e"}]


def test_forced_drafts_come_with_rows_that_are_sampled_again(stage: StageMatchers) -> None:
    begin(stage, inputs_of(0, task(1, 0, ABC, drafts_forced=True), task(2, 0, ABC, drafts_forced=True)))
    results, refused = taken(stage, map(sampled, "!a"))
    assert set(refused) == {0} and results[1] == sampled("a"), "not before all are taken in"
    results[0] = sampled("b")
    assert stage.take(results) == {}
    assert [row.forced_draft for row in results] == [(ord("c"),)] * 2


def test_a_forced_draft_that_cannot_be_computed_changes_nothing(
    stage: StageMatchers, monkeypatch: pytest.MonkeyPatch
) -> None:
    def use_up(matcher: GrammarMatcher) -> list[int]:
        raise LexerUsedUpError("used up")

    monkeypatch.setattr(GrammarMatcher, "peek_forced", use_up)
    assert step(stage, 0, task(1, 0, ABC, drafts_forced=True), says="a") == ([], (sampled("a"),))
    assert step(stage, 1, task(1, 1), says="c", refused="!")[0] == [{"c"}]


@pytest.mark.parametrize(
    ("method", "row"),
    [
        ("peek_forced", task(1, 0, ABC, drafts_forced=True)),
        ("forced", task(1, 0, ABC, may_force=True)),
        ("allowed", task(1, 0, ABC)),
        ("try_take", task(1, 0, ABC)),
    ],
)
def test_all_work_of_an_answer_is_charged_to_its_guard(
    stage: StageMatchers, monkeypatch: pytest.MonkeyPatch, method: str, row: Task
) -> None:
    """One call takes 3 s of processor time."""
    spent_ns, compute = [0], getattr(GrammarMatcher, method)

    def slow(*arguments: object) -> object:
        spent_ns[0] += 3_000_000_000
        return compute(*arguments)

    monkeypatch.setattr(matched_answer, "thread_time_ns", lambda: spent_ns[0])
    monkeypatch.setattr(GrammarMatcher, method, slow)
    step(stage, 0, row, says="a")
    monkeypatch.undo()
    _, (next_row,) = step(stage, 1, task(1, 1), says="c")
    assert next_row.failure is not None and next_row.failure.startswith("the grammar is too slow to follow")


def test_a_deferred_row_has_no_forced_draft(stage: StageMatchers, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread makes the row's matcher again in the meantime."""
    begin(stage, inputs_of(0, task(1, 0, ABC, drafts_forced=True), drafted(1, 1, "a")))
    monkeypatch.setattr(GrammarMatcher, "try_take", _second_is_used_up(GrammarMatcher.try_take))
    results, _ = taken(stage, map(sampled, "ac"))
    assert results[0] == sampled("a") and results[1].is_deferred

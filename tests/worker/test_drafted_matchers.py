"""Drafted rows of answers with a matcher: each is matched behind those that chose its token, and no other row is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from llamaclust.core.sampling import MatcherRow
from llamaclust.worker.stage.matchers import StageMatchers
from support.chat.matching import ABC, VOCABULARY, Task, begin, inputs_of, sampled, step, taken, task


@pytest.fixture
def stage() -> Iterator[StageMatchers]:
    made = StageMatchers(lambda: VOCABULARY, most=3)
    yield made
    made.close()


def drafted(key: int, place: int, letter: str) -> Task:
    """The row at this place of the answer, whose own token was drafted."""
    row = task(key, place).row
    return Task(replace(row, matcher=MatcherRow(key, place, ord(letter))), None)


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
    """Each among what its grammar allows behind the row before it; rows of others go on meanwhile."""
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


def test_forced_tokens_are_repeated_by_drafted_rows(stage: StageMatchers) -> None:
    """As they are by rows that were sent before they were known."""
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

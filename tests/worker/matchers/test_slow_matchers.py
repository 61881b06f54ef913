"""Tests of matchers with slow tokens: in each step, a bounded time limits the number of matched rows, in turns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from random import Random

import pytest

from llamaclust.model.grammars import definitions
from llamaclust.model.grammars.matcher import GrammarMatcher
from llamaclust.worker.stage import matched_answer
from llamaclust.worker.stage.matched_answer import DEFERRED
from llamaclust.worker.stage.matchers import StageMatchers
from support.chat.matching import VOCABULARY, sampled, step, task
from support.seed import SEED

ANSWERS, LENGTH = 16, 6
QUICK = ANSWERS  # the key of an additional answer
TEXTS = definitions.of_regex(f"[ab]{{{LENGTH}}}", "guided_regex")


@pytest.fixture
def stage() -> Iterator[StageMatchers]:
    made = StageMatchers(lambda: VOCABULARY, most=ANSWERS + 1)
    yield made
    made.close()


class Clock:
    """A thread's processor time: each token takes `token_ms`, except those of the quick answer."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, token_ms: float) -> None:
        self._ns = 0
        take = matched_answer.MatchedAnswer._take

        def timed(answer: matched_answer.MatchedAnswer, token: int) -> object:
            self._ns += int(token_ms * 1e6) if answer._start.key != QUICK else 0
            return take(answer, token)

        monkeypatch.setattr(matched_answer, "thread_time_ns", lambda: self._ns)
        monkeypatch.setattr(matched_answer.MatchedAnswer, "_take", timed)

    def pass_ms(self, ms: float) -> None:
        self._ns += int(ms * 1e6)


@pytest.mark.parametrize("token_ms", [20, 60, 110, 400, 700])
@pytest.mark.parametrize("refused", [False, True])
def test_a_step_looks_at_as_many_as_it_has_time_for_in_turns(
    stage: StageMatchers, monkeypatch: pytest.MonkeyPatch, token_ms: int, refused: bool
) -> None:
    """A refused token is matched again in the same step, which takes as long. After its first row, the quick answer is
    matched in each step."""
    print(f"seed {SEED}")
    Clock(monkeypatch, token_ms)
    monkeypatch.setattr(matched_answer, "_GUARD_NS", 10**18)
    most = min(ANSWERS, -(-matched_answer._STEP_NS // (token_ms * 1_000_000)))
    random = Random(SEED)
    texts = ["".join(random.choices("ab", k=LENGTH)) for _ in range(ANSWERS + 1)]
    places, since = Counter[int](), Counter[int]()
    for number in range(ANSWERS * LENGTH + 1):
        open_ = [key for key in range(ANSWERS + 1) if places[key] < LENGTH]
        if not open_:
            break
        tasks = [task(key, places[key], TEXTS if number == 0 else None) for key in open_]
        says = "".join(texts[key][places[key]] for key in open_)
        _, rows = step(stage, number, *tasks, says=says, refused="!" * len(says) if refused else "")
        for key, row in zip(open_, rows, strict=True):
            assert row is DEFERRED or row == sampled(texts[key][places[key]])
            since[key] = since[key] + 1 if row is DEFERRED else 0
            places[key] += row is not DEFERRED
            assert since[key] <= -(-ANSWERS // most), "each has its turn"
        assert since[QUICK] == 0 or not places[QUICK], "before its first row, nothing is known of it"
        begun = sum(since[key] == 0 for key in open_ if key != QUICK)
        assert min(most, len(set(open_) - {QUICK})) == begun
    assert places == Counter(dict.fromkeys(range(ANSWERS + 1), LENGTH))


@pytest.mark.parametrize(("token_ms", "told_ms"), [(0.9, 0), (1, 1), (37, 37), (2500, 2500)])
def test_results_have_the_time_of_rows_that_took_long(
    stage: StageMatchers, monkeypatch: pytest.MonkeyPatch, token_ms: float, told_ms: int
) -> None:
    Clock(monkeypatch, token_ms)
    monkeypatch.setattr(matched_answer, "_GUARD_NS", 10**18)
    tasks = [task(0, 0, TEXTS), task(QUICK, 0, TEXTS)]
    _, rows = step(stage, 0, *tasks, says="ab")
    assert [row.matcher_ns for row in rows] == [told_ms * 1_000_000, 0]
    _, rows = step(stage, 1, task(0, 1), says="a", refused="!")
    assert [row.matcher_ns for row in rows] == [2 * int(token_ms * 1e6) if 2 * token_ms >= 1 else 0]


@pytest.mark.parametrize(("draft_ms", "told_ns"), [(0.3, 0), (0.999, 0), (1, 1_000_000), (12.5, 12_500_000)])
def test_a_draft_that_took_less_than_a_millisecond_is_sent_without_its_time(
    stage: StageMatchers, monkeypatch: pytest.MonkeyPatch, draft_ms: float, told_ns: int
) -> None:
    clock = Clock(monkeypatch, 0)
    peek = GrammarMatcher.peek_forced

    def timed(matcher: GrammarMatcher) -> list[int]:
        clock.pass_ms(draft_ms)
        return peek(matcher)

    monkeypatch.setattr(GrammarMatcher, "peek_forced", timed)
    abc = definitions.of_regex("abc", "guided_regex")
    _, (row,) = step(stage, 0, task(0, 0, abc, drafts_forced=True), says="a")
    assert row.forced_draft and row.matcher_ns == told_ns

"""Grammars at the last stage: what its rows may choose, and what goes wrong in one answer alone."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from itertools import count

import pytest

from llamaclust.core.errors import ProtocolError
from llamaclust.core.sampling import (
    Grammar,
    GrammarRow,
    GrammarStart,
    Reasoning,
    RowResult,
    RowTask,
    SampleTask,
    SamplingParams,
)
from llamaclust.core.sampling_bounds import MAX_FORCED_TOKENS
from llamaclust.model.grammars import definitions, matcher
from llamaclust.model.grammars.matcher import GrammarMatcher
from llamaclust.model.grammars.vocabulary import GrammarVocabulary
from llamaclust.wire.microbatch.messages import SamplingInputs
from llamaclust.worker.stage import grammars as module
from llamaclust.worker.stage.grammars import StageGrammars
from support.models.random_schemas import token_set

END = 256
VOCABULARY = GrammarVocabulary(
    [*(bytes([byte]) for byte in range(256)), b"\xff<end>"], [END], lambda text: [*text.encode()]
)
ABC = definitions.of_regex("[ab]c(d|e)", "guided_regex")


@pytest.fixture
def stage() -> Iterator[StageGrammars]:
    made = StageGrammars(lambda: VOCABULARY, most=3)
    yield made
    made.close()


def task(
    key: int,
    place: int,
    grammar: Grammar | None = None,
    said: str = "",
    *,
    may_force: bool = False,
    min_tokens: bool = False,
    reasoning: Reasoning | None = None,
) -> SampleTask:
    start = None
    if grammar is not None or reasoning is not None:
        start = GrammarStart(grammar, tuple(said.encode()), reasoning)
    row = GrammarRow(key, place, start, may_force)
    return SampleTask(SamplingParams(), 0, 0, 9, suppressed=(END,) if min_tokens else (), grammar=row)


def step(
    stage: StageGrammars, number: int, *tasks: RowTask, says: str, refused: str = "", released: tuple[int, ...] = ()
) -> tuple[list[set[str]], tuple[RowResult, ...]]:
    """What each row could choose whose letter of `refused` its grammar does not allow, and the results where the rows
    chose the letters of `says`, such a row at its second draw."""
    inputs = SamplingInputs(1, number, tasks, released)
    stage.receive(inputs)
    stage.begin(inputs)
    results, allowed = stage.take(tuple(map(sampled, refused or says)))
    for place in allowed:
        results[place] = stage.take_again(place, sampled(says[place]))
    return [{"." if i == END else chr(i) for i in token_set(bits)} for bits in allowed.values()], tuple(results)


def sampled(letter: str) -> RowResult:
    return RowResult(END if letter == "." else ord(letter), -1.0)


def test_each_answer_has_a_state_of_its_own(stage: StageGrammars) -> None:
    assert step(stage, 0, task(1, 0, ABC), task(2, 1, ABC, "b"), says="ac", refused="!!")[0] == [set("ab"), {"c"}]
    assert step(stage, 1, task(2, 2), task(1, 1), says="ec", refused="!!")[0] == [set("de"), {"c"}]
    assert step(stage, 2, task(1, 2), task(2, 3), says="d.", refused="!!")[0] == [set("de"), {"."}]
    assert step(stage, 3, task(2, 4), says=".", refused="!")[0] == [{"."}], "a row after the end"


def test_a_token_that_is_not_allowed_is_sampled_again_among_those_that_are(stage: StageGrammars) -> None:
    allowed, rows = step(stage, 0, *(task(key, 0, ABC) for key in range(3)), says="aba", refused="axc")
    assert allowed == [set("ab"), set("ab")], "of the second and the third row"
    assert rows == tuple(map(sampled, "aba"))
    assert step(stage, 1, *(task(key, 1) for key in range(3)), says="ccc") == ([], tuple(map(sampled, "ccc")))


def test_forced_tokens_come_with_the_sampled_one_and_rows_sent_before_repeat_them(stage: StageGrammars) -> None:
    _, (row,) = step(stage, 0, task(1, 0, ABC, may_force=True), says="a")
    assert row == RowResult(ord("a"), -1.0, forced=(ord("c"),))
    assert step(stage, 1, task(1, 1, may_force=True), says="x")[1] == (RowResult(ord("c"), 0.0),)
    assert step(stage, 2, task(1, 2, may_force=True), says="e", refused="!")[0] == [set("de")]


def test_an_answer_begins_with_its_forced_tokens(stage: StageGrammars) -> None:
    grammar = definitions.of_regex("ca[de]", "guided_regex")
    assert step(stage, 0, task(1, 0, grammar, may_force=True), says="x")[1] == (
        RowResult(ord("c"), 0.0, forced=(ord("a"),)),
    )
    assert step(stage, 1, task(1, 2, may_force=True), says="d", refused="!")[0] == [set("de")]


def test_an_answer_that_starts_again_behind_its_forced_tokens_samples_as_before(stage: StageGrammars) -> None:
    """A longer run than one row may add: its next token is sampled, also after a loss."""
    grammar = definitions.of_regex(f"[ab]{'c' * MAX_FORCED_TOKENS}cd", "guided_regex")
    _, (row,) = step(stage, 0, task(1, 0, grammar, may_force=True), says="a")
    assert len(row.forced) == MAX_FORCED_TOKENS
    said = "a" + "c" * MAX_FORCED_TOKENS
    undisturbed = step(stage, 1, task(1, len(said), may_force=True), says="c", refused="d")
    again = step(stage, 2, task(2, len(said), grammar, said, may_force=True), says="c", refused="d")
    assert again == undisturbed == ([{"c"}], (RowResult(ord("c"), -1.0, forced=(ord("d"),)),))


def test_the_end_of_reasoning_is_forced_after_its_budget(stage: StageGrammars) -> None:
    """Together where that is wanted, else one token at a time, which are sampled for their logprobs."""
    budget = Reasoning(("<t>",), ("!?",), tuple(b"!?"), 2, is_open=True, delays_grammar=True)
    tasks = (
        task(1, 0, may_force=True, reasoning=budget),
        task(2, 0, reasoning=budget),
        task(3, 0, ABC, reasoning=budget),
    )
    assert step(stage, 0, *tasks, says="xxx") == ([], tuple(map(sampled, "xxx")))
    _, rows = step(stage, 1, task(1, 1, may_force=True), task(2, 1), task(3, 1), says="yyy")
    assert rows == (RowResult(ord("y"), -1.0, forced=tuple(b"!?")), *map(sampled, "yy"))
    allowed, rows = step(stage, 2, task(1, 4), task(2, 2), task(3, 2), says="z!!", refused="zzz")
    assert (allowed, rows) == ([{"!"}, {"!"}], tuple(map(sampled, "z!!")))
    step(stage, 3, task(2, 3), task(3, 3), says="??")
    assert step(stage, 4, task(2, 4), task(3, 4), says="za", refused="zz")[0] == [set("ab")]


def test_a_forced_end_may_not_be_suppressed(stage: StageGrammars) -> None:
    budget = Reasoning(("<t>",), (".",), (END,), 1, is_open=True)
    inputs = SamplingInputs(1, 0, (task(1, 1, said="a", min_tokens=True, reasoning=budget),))
    stage.receive(inputs)
    (ends,) = stage.begin(inputs)
    assert isinstance(ends, SampleTask) and ends.suppressed == ()


def test_a_grammar_that_cannot_be_followed_fails_its_answer_alone(stage: StageGrammars) -> None:
    wrong = Grammar('{"grammars": [{"lark_grammar": "start: nothing"}]}')
    _, (bad, good) = step(stage, 0, task(1, 0, wrong), task(2, 0, ABC), says="ab")
    assert bad.failure is not None and "the grammar cannot be used" in bad.failure
    assert good == RowResult(ord("b"), -1.0)
    _, (again,) = step(stage, 1, task(1, 0, ABC), says="a")
    assert again.failure is None, "it starts again"


def test_a_token_that_takes_too_long_fails_its_answer(stage: StageGrammars, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_TOKEN_NS", -1)
    budget = Reasoning(("<t>",), ("!?",), tuple(b"!?"), 2, is_open=True)
    step(stage, 0, task(1, 0, ABC), task(2, 0, reasoning=budget), says="aa")
    _, (row, other) = step(stage, 1, task(1, 1), task(2, 1), says="cc")
    assert row.failure is not None and row.failure.startswith("the grammar costs too much time")
    assert other.failure is not None and other.failure.startswith("the budget of reasoning costs too much time")


def test_all_rows_of_a_step_share_a_time(stage: StageGrammars, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those fail that are expected to take more than their share when it is used up."""
    step(stage, 0, *(task(key, 0, ABC) for key in range(3)), says="aaa")
    for key, expected_ns in enumerate((1 << 40, 0, 1 << 40)):
        stage._answers[key]._expected_ns = expected_ns
    monkeypatch.setattr(module._StepTime, "left_ns", property(lambda _: 0, lambda *_: None))
    _, (slow, quick, slow_too) = step(stage, 1, *(task(key, 1) for key in range(3)), says="ccc")
    assert quick == RowResult(ord("c"), -1.0)
    for row in (slow, slow_too):
        assert row.failure is not None and "a step's rows take more than" in row.failure


def test_matchers_that_are_built_again_in_a_step_share_a_time(
    stage: StageGrammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second fails for which less is left than it takes; a row that needs none goes on."""
    clock = count(0, 10_000_000)  # each reading is one token
    for timed in (module, matcher):
        monkeypatch.setattr(timed, "thread_time_ns", lambda: next(clock))
    schema = {"type": "string", "pattern": r"^(?:\S+\s+){0,29}\S+$", "maxLength": 400}
    words = definitions.of_schema(schema, "json_schema")
    letters = definitions.of_regex('"[a-z ,]*', "guided_regex")
    for place, letter in enumerate('"the quick brown fox jumps over the lazy dog again and again, and once more'):
        grammars: tuple[Grammar | None, ...] = (None,) * 3 if place else (words, words, letters)
        tasks = [task(key, place, grammar) for key, grammar in enumerate(grammars)]
        _, (first, second, simple) = step(stage, place, *tasks, says=3 * letter)
        assert first.failure is None and simple.failure is None, f"at {place}"
        if second.failure is not None:
            break
    assert second.failure is not None and "are computed again take more than the" in second.failure


def test_a_start_that_takes_too_long_fails_its_answer(stage: StageGrammars, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BUILD_NS", -1)
    _, (bad, good) = step(stage, 0, task(1, 2, ABC, "ac"), task(2, 0, ABC), says="da")
    assert bad.failure is not None and "its start takes more than" in bad.failure
    assert good.failure is None


def test_a_grammar_that_is_not_ready_in_time_fails_its_answer(
    stage: StageGrammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_READY_S", 0.01)
    go_on = threading.Event()
    stage._thread.submit(go_on.wait, 30)
    inputs = SamplingInputs(1, 0, (task(1, 0, ABC),))
    stage.receive(inputs)
    asyncio.run(stage.ready(inputs))
    stage.begin(inputs)
    (row,), _ = stage.take((RowResult(ord("a"), -1.0),))
    go_on.set()
    assert row.failure == "the grammar was not ready in 0.01 s"


def test_a_fault_of_the_matcher_fails_its_answer_alone(stage: StageGrammars, monkeypatch: pytest.MonkeyPatch) -> None:
    take, try_take = GrammarMatcher.take, GrammarMatcher.try_take

    def checked(token: int) -> int:
        if token == ord("b"):
            raise IndexError("a token beyond the vocabulary")
        return token

    monkeypatch.setattr(GrammarMatcher, "take", lambda matcher, tokens: take(matcher, map(checked, tokens)))
    monkeypatch.setattr(GrammarMatcher, "try_take", lambda matcher, token: try_take(matcher, checked(token)))
    step(stage, 0, task(1, 1, ABC, "b"), task(2, 0, ABC), task(3, 0, ABC), says="cba")
    _, (started, sampled, good) = step(stage, 1, task(1, 2), task(2, 1), task(3, 1), says="dcc")
    assert started.failure == sampled.failure == "the grammar failed: IndexError: a token beyond the vocabulary"
    assert good.failure is None


def test_a_row_without_a_token_ends_its_state(stage: StageGrammars) -> None:
    inputs = SamplingInputs(1, 0, (task(1, 0, ABC),))
    stage.receive(inputs)
    stage.begin(inputs)
    stage.take((RowResult(-1, float("nan"), failure="not finite"),))
    assert step(stage, 1, task(1, 1), says="a")[1][0].failure == "not finite"


def test_nothing_but_the_end_may_not_be_suppressed(stage: StageGrammars) -> None:
    inputs = SamplingInputs(1, 0, (task(1, 3, ABC, "acd", min_tokens=True), task(2, 1, ABC, "a", min_tokens=True)))
    stage.receive(inputs)
    ends, goes_on = stage.begin(inputs)
    assert isinstance(ends, SampleTask) and isinstance(goes_on, SampleTask)
    assert (ends.suppressed, goes_on.suppressed) == ((), (END,))


def test_rows_of_answers_that_are_not_there_break_the_protocol(stage: StageGrammars) -> None:
    step(stage, 0, task(1, 0, ABC), says="a")
    with pytest.raises(ProtocolError, match="has 1 tokens here, not 2"):
        step(stage, 1, task(1, 2), says="d")
    with pytest.raises(ProtocolError, match="whose grammar is not here"):
        step(stage, 2, task(1, 1), says="c", released=(1,))


def test_no_more_answers_are_kept_than_run(stage: StageGrammars) -> None:
    step(stage, 0, *(task(key, 0, ABC) for key in range(3)), says="aaa")
    step(stage, 1, task(3, 0, ABC), says="a", released=(0,))
    with pytest.raises(ProtocolError, match="grammars of 4 answers"):
        step(stage, 2, task(4, 0, ABC), says="a")

"""Tests of matchers at the last stage: the tokens that they allow, and failures that affect only one answer."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from functools import partial
from unittest.mock import Mock

import pytest

from llamaclust.core.errors import ProtocolError
from llamaclust.core.sampler.bounds import MAX_FORCED_TOKENS
from llamaclust.core.sampler.matchers import Grammar, Reasoning
from llamaclust.core.sampler.results import RowResult
from llamaclust.model.grammars import definitions
from llamaclust.model.grammars.matcher import GrammarMatcher, LexerUsedUpError
from llamaclust.worker.stage import matched_answer as module
from llamaclust.worker.stage import matchers
from llamaclust.worker.stage.matched_answer import DEFERRED
from llamaclust.worker.stage.matchers import StageMatchers
from support.chat.matching import ABC, END, VOCABULARY, begin, inputs_of, sampled, step, taken, task


@pytest.fixture
def stage() -> Iterator[StageMatchers]:
    made = StageMatchers(lambda: VOCABULARY, most=3)
    yield made
    made.close()


def test_each_answer_has_a_state_of_its_own(stage: StageMatchers) -> None:
    assert step(stage, 0, task(1, 0, ABC), task(2, 1, ABC, "b"), says="ac", refused="!!")[0] == [set("ab"), {"c"}]
    assert step(stage, 1, task(2, 2), task(1, 1), says="ec", refused="!!")[0] == [set("de"), {"c"}]
    assert step(stage, 2, task(1, 2), task(2, 3), says="d.", refused="!!")[0] == [set("de"), {"."}]
    assert step(stage, 3, task(2, 4), says=".", refused="!")[0] == [{"."}], "a row after the end"


def test_a_token_that_is_not_allowed_is_sampled_again_among_those_that_are(stage: StageMatchers) -> None:
    allowed, rows = step(stage, 0, *(task(key, 0, ABC) for key in range(3)), says="aba", refused="axc")
    assert allowed == [set("ab"), set("ab")], "of the second and the third row"
    assert rows == tuple(map(sampled, "aba"))
    assert step(stage, 1, *(task(key, 1) for key in range(3)), says="ccc") == ([], tuple(map(sampled, "ccc")))


def test_forced_tokens_come_with_the_sampled_one_and_rows_sent_before_repeat_them(stage: StageMatchers) -> None:
    _, (row,) = step(stage, 0, task(1, 0, ABC, may_force=True), says="a")
    assert row == RowResult(ord("a"), -1.0, forced=(ord("c"),))
    assert step(stage, 1, task(1, 1, may_force=True), says="x")[1] == (RowResult(ord("c"), 0.0),)
    assert step(stage, 2, task(1, 2, may_force=True), says="e", refused="!")[0] == [set("de")]


def test_an_answer_begins_with_its_forced_tokens(stage: StageMatchers) -> None:
    grammar = definitions.of_regex("ca[de]", "guided_regex")
    assert step(stage, 0, task(1, 0, grammar, may_force=True), says="x")[1] == (
        RowResult(ord("c"), 0.0, forced=(ord("a"),)),
    )
    assert step(stage, 1, task(1, 2, may_force=True), says="d", refused="!")[0] == [set("de")]


def test_an_answer_that_starts_again_behind_its_forced_tokens_samples_as_before(stage: StageMatchers) -> None:
    """The forced run is longer than one row may add, so the token after it is sampled, also after a loss."""
    grammar = definitions.of_regex(f"[ab]{'c' * MAX_FORCED_TOKENS}cd", "guided_regex")
    _, (row,) = step(stage, 0, task(1, 0, grammar, may_force=True), says="a")
    assert len(row.forced) == MAX_FORCED_TOKENS
    said = "a" + "c" * MAX_FORCED_TOKENS
    undisturbed = step(stage, 1, task(1, len(said), may_force=True), says="c", refused="d")
    again = step(stage, 2, task(2, len(said), grammar, said, may_force=True), says="c", refused="d")
    assert again == undisturbed == ([{"c"}], (RowResult(ord("c"), -1.0, forced=(ord("d"),)),))


def test_the_end_of_reasoning_is_forced_after_its_budget(stage: StageMatchers) -> None:
    """Forced tokens come in one row if the request allows it, otherwise one by one, sampled for their logprobs."""
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


def test_a_forced_end_may_not_be_suppressed(stage: StageMatchers) -> None:
    budget = Reasoning(("<t>",), (".",), (END,), 1, is_open=True)
    assert begin(stage, inputs_of(0, task(1, 1, said="a", min_tokens=True, reasoning=budget))) == [0]


def test_a_grammar_that_cannot_be_followed_fails_its_answer_alone(stage: StageMatchers) -> None:
    wrong = Grammar('{"grammars": [{"lark_grammar": "start: nothing"}]}')
    _, (bad, good) = step(stage, 0, task(1, 0, wrong), task(2, 0, ABC), says="ab")
    assert bad.failure is not None and "the grammar cannot be used" in bad.failure
    assert good == RowResult(ord("b"), -1.0)
    _, (again,) = step(stage, 1, task(1, 0, ABC), says="a")
    assert again.failure is None, "it starts again"


def test_an_answer_whose_tokens_keep_taking_too_long_fails_alone(
    stage: StageMatchers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One slow token does not fail an answer, and slowness is not the request's fault."""
    step(stage, 0, task(1, 0, ABC), task(2, 0, ABC), says="aa")
    stage._answers[1]._excess_ns = module._GUARD_NS + 2 * module._TOKEN_NS
    stage._answers[2]._excess_ns = module._GUARD_NS // 2
    _, (row, other) = step(stage, 1, task(1, 1), task(2, 1), says="cc")
    assert row.failure is not None and row.failure.startswith("the grammar is too slow") and not row.is_request_fault
    assert other == sampled("c")
    _, (again,) = step(stage, 2, task(1, 2), says="d")
    assert again == row, "for good"


def test_a_grammar_that_breaks_within_an_answer_is_the_requests_fault(stage: StageMatchers) -> None:
    """Three grammars fail after the first letter: an endless rule, too many items in a row, and an endless lexer."""
    optional = {f"p{i}": {"type": "string"} for i in range(900)}
    dead = definitions.of_lark('start: "a" rule | "b"\nrule: rule', "grammar")
    wide = definitions.of_schema({"type": "array", "items": {"type": "object", "properties": optional}}, "json_schema")
    wordy = definitions.of_schema({"type": "string", "pattern": r"^(?:\S+\s+){0,290}\S+$", "maxLength": 4000}, "s")
    for key, (grammar, text) in enumerate(((dead, "ax"), (wide, '[{"p'), (wordy, '"the q'))):
        number = 0
        for place, letter in enumerate(text):
            row = DEFERRED
            while row is DEFERRED:
                start = (grammar,) if number == 0 else ()
                _, (row,) = step(stage, 100 * key + number, task(key, place, *start), says=letter)
                number += 1
            if row.failure is not None:
                break
        assert row.failure is not None and row.is_request_fault, grammar.origin
        assert "the answer cannot continue" in row.failure or "became too complex" in row.failure


AMBIGUOUS = {
    "pairs": 'start: s\ns: s s | "a"',
    "triples": 'start: s\ns: s s s | s s | "a" | "ab"',
    "operators": 'start: e\ne: e "a" e | e "aa" e | "a"',
    "runs": 'start: (x | y)*\nx: "a" x | "a"\ny: "a" y "a" | "a"',
    "a comment on schemas": '// %json\nstart: s\ns: s s | "a"',
    "a word of schemas": 'start: s\ns: s s | "a" | "\\"json_schema\\""',
    "a schema beside": 'start: s | schema\ns: s s | "a"\nschema: %json {"type": "integer"}',
    "the name of our rules": 'start: s\ns: s s | "a" | "own_rules"',
}


@pytest.mark.parametrize("name", AMBIGUOUS)
def test_a_count_ends_ambiguous_grammars_before_the_clock(stage: StageMatchers, name: str) -> None:
    """The answer ends at the same token on every machine, and no token takes nearly as long as the guard allows."""
    grammar, number, row = definitions.of_lark(AMBIGUOUS[name], "grammar"), 0, sampled("a")
    for place in range(2000):
        row = DEFERRED
        while row is DEFERRED:
            _, (row,) = step(stage, number, task(1, place, *((grammar,) if number == 0 else ())), says="a")
            number += 1
        if row.failure is not None:
            break
    assert row.failure is not None and "became too complex" in row.failure and row.is_request_fault
    assert "max is 800" in row.failure


def test_an_answer_goes_on_after_its_lexer_is_used_up(stage: StageMatchers) -> None:
    """llguidance limits the lexer's work since it last computed the allowed tokens."""
    schema = {"type": "string", "pattern": r"^(?:\S+\s+){0,29}\S+$", "maxLength": 400}
    words, text = (
        definitions.of_schema(schema, "json_schema"),
        '"the quick brown fox jumps over the lazy dog again and again, and once more"',
    )
    number, deferred = 0, 0
    for place, letter in enumerate(text):
        start = (words,) if place == 0 else ()
        _, (row,) = step(stage, number, task(1, place, *start), says=letter)
        while row is DEFERRED:
            number, deferred = number + 1, deferred + 1
            _, (row,) = step(stage, number, task(1, place), says=letter)
        assert row == sampled(letter), f"at {place}"
        number += 1
    assert deferred == 1
    assert step(stage, number, task(1, len(text)), says=".", refused="x")[0] == [{"."}]


def test_a_start_that_takes_too_long_fails_its_answer(stage: StageMatchers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_GUARD_NS", -1)
    _, (bad, good) = step(stage, 0, task(1, 2, ABC, "ac"), task(2, 0, ABC), says="da")
    assert bad.failure is not None and bad.failure.startswith("the grammar is too slow")
    assert good.failure is not None, "at its first token"


def test_a_grammar_that_is_not_ready_in_time_fails_its_answer(
    stage: StageMatchers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time before the grammar's turn does not count."""
    monkeypatch.setattr(module, "_READY_S", -1)
    began, go_on = threading.Event(), threading.Event()

    def wait(*_: object) -> None:
        began.set()
        go_on.wait(30)

    monkeypatch.setattr(module.MatchedAnswer, "_make_matcher", wait)
    inputs = inputs_of(0, task(1, 0, ABC), task(2, 0, ABC))
    stage.receive(inputs)
    assert began.wait(60)
    stage.begin(inputs.tasks)
    (late, queued), _ = taken(stage, (sampled("a"), sampled("a")))
    go_on.set()
    assert late.failure == "the grammar was not ready in -1 s" and queued is DEFERRED
    assert not late.is_request_fault, "another worker may be faster"


def test_matchers_of_answers_that_are_released_are_not_made(stage: StageMatchers) -> None:
    """Rows of released answers are deferred, and later rows do not wait for them."""
    go_on = threading.Event()
    stage._threads.submit(0, 0, partial(go_on.wait, 30))
    first, second = inputs_of(0, task(1, 0, ABC), task(2, 0, ABC)), inputs_of(1, task(2, 0, ABC), released=(1, 2))
    stage.receive(first)
    stage.receive(second)
    go_on.set()
    for answer in filter(None, stage._changes.values()):
        answer.ready.result(60)
    asyncio.run(stage.ready(first.tasks))
    stage.begin(first.tasks)
    assert taken(stage, (sampled("a"), sampled("a"))) == ([DEFERRED, DEFERRED], {})
    stage.begin(second.tasks)
    assert taken(stage, (sampled("a"),)) == ([sampled("a")], {})


def test_no_matchers_of_an_epoch_that_is_over_are_made(stage: StageMatchers) -> None:
    go_on = threading.Event()
    stage._threads.submit(0, 0, partial(go_on.wait, 30))
    stage.receive(inputs_of(0, task(1, 0, ABC)))
    (answer,) = stage._changes.values()
    assert answer is not None
    stage.clear()
    go_on.set()
    answer.ready.result(60)
    assert answer._matcher is None


def test_rows_whose_matcher_is_not_ready_are_deferred_and_the_others_go_on(stage: StageMatchers) -> None:
    """The row after a deferred row is also deferred, since it was sent before the deferral was known."""
    step(stage, 0, task(2, 0, ABC), says="a")
    go_on = threading.Event()
    stage._threads.submit(0, 0, partial(go_on.wait, 30))
    stage.receive(inputs_of(1, task(1, 0, ABC)))
    for number, row in enumerate((0, 0, 1), start=1):
        inputs = inputs_of(number, task(1, row), task(2, number))
        asyncio.run(stage.ready(inputs.tasks))
        stage.begin(inputs.tasks)
        results, refused = taken(stage, (sampled("x"), sampled("acd."[number])))
        assert results == [DEFERRED, sampled("acd."[number])] and not refused
    go_on.set()
    assert step(stage, 4, task(1, 1), says="c")[1] == (DEFERRED,), "behind a row that is still to come"
    assert step(stage, 5, task(1, 0), says="b", refused="x") == ([set("ab")], (sampled("b"),))
    assert step(stage, 6, task(1, 1), says="c")[1] == (sampled("c"),)
    with pytest.raises(ProtocolError, match="has 2 tokens on this worker, expected 3"):
        step(stage, 7, task(1, 3), says="d")


def test_no_row_passes_a_deferred_one(stage: StageMatchers) -> None:
    """An answer that begins with forced tokens is also deferred, since the next row would repeat them."""
    go_on = threading.Event()
    stage._threads.submit(0, 0, partial(go_on.wait, 30))
    grammar = definitions.of_regex("ca[de]", "guided_regex")
    inputs = inputs_of(0, task(1, 0, grammar, may_force=True))
    stage.receive(inputs)
    stage.begin(inputs.tasks)
    assert taken(stage, (sampled("x"),)) == ([DEFERRED], {})
    go_on.set()
    assert step(stage, 1, task(1, 1), says="x")[1] == (DEFERRED,)
    assert step(stage, 2, task(1, 0), says="x")[1] == (RowResult(ord("c"), 0.0, forced=(ord("a"),)),)


def test_a_step_without_other_rows_waits_for_matchers(stage: StageMatchers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matchers, "_ALONE_S", 30)
    monkeypatch.setattr(matchers, "_FIRST_S", 0)
    inputs, go_on = inputs_of(0, task(1, 0, ABC)), threading.Event()
    stage._threads.submit(0, 0, partial(go_on.wait, 30))
    stage.receive(inputs)

    async def ready() -> None:
        asyncio.get_running_loop().call_soon(go_on.set)
        await stage.ready(inputs.tasks)

    asyncio.run(ready())
    stage.begin(inputs.tasks)
    assert taken(stage, (sampled("a"),)) == ([sampled("a")], {})


def test_a_matcher_is_made_again_beside_the_steps(stage: StageMatchers, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second matcher allows all tokens, even if the lexer's limit was reached; the row is sampled as before."""
    step(stage, 0, task(1, 0, ABC), task(2, 0, ABC), says="ab")
    stage._answers[1]._matcher = used_up = Mock()
    used_up.try_take.side_effect = LexerUsedUpError("used up")
    assert step(stage, 1, task(1, 1), task(2, 1), says="cc")[1] == (DEFERRED, sampled("c"))
    assert step(stage, 2, task(1, 2), task(2, 2), says="dd")[1] == (DEFERRED, sampled("d")), "a row sent before that"
    assert step(stage, 3, task(1, 1), says="c", refused="x") == ([{"c"}], (sampled("c"),))
    made = stage._answers[1]._matcher
    assert isinstance(made, GrammarMatcher) and made._is_costly and made.position == 2


def test_a_fault_of_the_matcher_fails_its_answer_alone(stage: StageMatchers, monkeypatch: pytest.MonkeyPatch) -> None:
    take, try_take = GrammarMatcher.take, GrammarMatcher.try_take

    def checked(token: int) -> int:
        if token == ord("b"):
            raise IndexError("a token beyond the vocabulary")
        return token

    monkeypatch.setattr(GrammarMatcher, "take", lambda matcher, tokens: take(matcher, map(checked, tokens)))
    monkeypatch.setattr(GrammarMatcher, "try_take", lambda matcher, token: try_take(matcher, checked(token)))
    step(stage, 0, task(1, 1, ABC, "b"), task(2, 0, ABC), task(3, 0, ABC), says="cba")
    _, (started, sampled, good) = step(stage, 1, task(1, 2), task(2, 1), task(3, 1), says="dcc")
    assert not started.is_request_fault and not sampled.is_request_fault, "a fault of ours"
    assert started.failure == sampled.failure == "the grammar failed: IndexError: a token beyond the vocabulary"
    assert good.failure is None


def test_a_row_without_a_token_ends_its_state(stage: StageMatchers) -> None:
    begin(stage, inputs_of(0, task(1, 0, ABC)))
    taken(stage, (RowResult(-1, float("nan"), failure="not finite"),))
    assert step(stage, 1, task(1, 1), says="a")[1][0].failure == "not finite"


def test_nothing_but_the_end_may_not_be_suppressed(stage: StageMatchers) -> None:
    complete = begin(
        stage, inputs_of(0, task(1, 3, ABC, "acd", min_tokens=True), task(2, 1, ABC, "a", min_tokens=True))
    )
    assert complete == [0]


def test_rows_of_answers_that_are_not_there_break_the_protocol(stage: StageMatchers) -> None:
    step(stage, 0, task(1, 0, ABC), says="a")
    with pytest.raises(ProtocolError, match="has 1 tokens on this worker, expected 2"):
        step(stage, 1, task(1, 2), says="d")
    with pytest.raises(ProtocolError, match="is missing on this worker"):
        step(stage, 2, task(1, 1), says="c", released=(1,))


def test_no_more_answers_are_kept_than_run(stage: StageMatchers) -> None:
    step(stage, 0, *(task(key, 0, ABC) for key in range(3)), says="aaa")
    step(stage, 1, task(3, 0, ABC), says="a", released=(0,))
    with pytest.raises(ProtocolError, match="4 answers have grammar matchers"):
        step(stage, 2, task(4, 0, ABC), says="a")


def test_answers_that_end_before_they_begin_do_not_stop_the_stage(stage: StageMatchers) -> None:
    """Each microbatch in flight may start as many answers as the stage runs."""
    for number in range(4):
        keys = range(3 * number, 3 * number + 3)
        ended = tuple(key - 3 for key in keys if number)
        stage.receive(inputs_of(number, *(task(key, 0, ABC) for key in keys), released=ended))
    for number in range(4):
        keys = range(3 * number, 3 * number + 3)
        stage.begin(inputs_of(number, *(task(key, 0) for key in keys)).tasks)


def test_answers_released_before_their_first_row_leave_no_matcher(stage: StageMatchers) -> None:
    """An answer's start arrives with the first chunk of its prompt, which has no rows and begins no step."""
    for key in range(4):
        stage.receive(inputs_of(2 * key, task(key, 0, ABC)))
        begin(stage, inputs_of(2 * key + 1, released=(key,)))
        assert not stage._answers


def test_an_answer_released_in_a_step_that_failed_is_dropped_by_the_next(stage: StageMatchers) -> None:
    step(stage, 0, task(1, 0, ABC), says="a")
    stage.receive(inputs_of(1, released=(1,)))
    step(stage, 2, task(2, 0, ABC), says="a")
    assert list(stage._answers) == [2]


def test_no_more_answers_start_than_a_coordinator_has_in_flight(
    stage: StageMatchers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matchers, "MOST_IN_FLIGHT", 2)
    for number in range(2):
        stage.receive(inputs_of(number, *(task(3 * number + place, 0, ABC) for place in range(3))))
    with pytest.raises(ProtocolError, match="more than 6 grammar matchers are starting"):
        stage.receive(inputs_of(2, task(6, 0, ABC)))


def test_a_vocabulary_is_read_before_the_first_answer_and_once() -> None:
    read = Mock(return_value=VOCABULARY)
    stage = StageMatchers(read, most=3)
    for _ in range(2):
        stage.prepare()
    assert step(stage, 0, task(1, 0, ABC), says="a")[1] == (sampled("a"),)
    stage.close()
    read.assert_called_once_with()

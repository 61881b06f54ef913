"""Tests of grammars in sampling inputs, and of forced tokens in results."""

from __future__ import annotations

from math import nan

import pytest

from llamaclust.core.errors import ProtocolError
from llamaclust.core.sampler.bounds import (
    MAX_CONTEXT_TOKENS,
    MAX_GRAMMAR_BYTES,
    MAX_MATCHER_NS,
    MAX_REASONING_END_TOKENS,
    MAX_VOCABULARY,
)
from llamaclust.core.sampler.matchers import Grammar, MatcherStart, Reasoning
from llamaclust.core.sampler.params import SamplingParams
from llamaclust.core.sampler.results import RowResult
from llamaclust.core.sampler.tasks import MatcherRow, SampleTask
from llamaclust.proto import sampling_pb2
from llamaclust.wire.microbatch.inputs import encode_inputs
from llamaclust.wire.microbatch.messages import Result, SamplingInputs
from llamaclust.wire.microbatch.results import decode_result
from support.wire.slow_codec import decode_inputs, encode_result


def starts(*starts: MatcherStart) -> SamplingInputs:
    return SamplingInputs(1, 0, (), starts=starts)


def reasons(reasoning: Reasoning | None, grammar: Grammar | None = None) -> SamplingInputs:
    return starts(MatcherStart(1, grammar, (5, 6), reasoning))


def row(key: int, position: int) -> SampleTask:
    return SampleTask(SamplingParams(), 1, 0, 9, matcher=MatcherRow(key, position))


@pytest.mark.parametrize("grammar", [None, Grammar("x")])
@pytest.mark.parametrize(
    "reasoning",
    [
        Reasoning(("<think>",), ("</think>", "é"), (7, 8, 9), 100, is_open=True),
        Reasoning(("<a>", "<b>"), ("</a>",), (7,), 0, repeats=True),
        Reasoning(("<a>",), ("</a>",), delays_grammar=True),
    ],
)
def test_reasoning_arrives_as_it_was_sent(reasoning: Reasoning, grammar: Grammar | None) -> None:
    inputs = reasons(reasoning, grammar)
    assert decode_inputs(encode_inputs(inputs)) == inputs


def test_grammars_arrive_as_they_were_sent_and_equal_ones_are_sent_once() -> None:
    free, lazy = Grammar("x" * 1000), Grammar("y", ("<call>", "é"))
    started = (
        MatcherStart(1, free),
        MatcherStart(2, lazy, (5, 6, 7), may_force=True),
        MatcherStart(4, free, drafts_forced=True, owner=(1 << 32) - 1),
    )
    inputs = SamplingInputs(1, 0, (row(1, 0), row(3, 9)), (7, 8), started)
    data = encode_inputs(inputs)
    assert decode_inputs(data) == inputs
    assert data.count(b"x" * 1000) == 1
    rows = (
        RowResult(3, -1.0, forced=(4, 5)),
        RowResult(3, -1.0, forced_draft=(6,)),
        RowResult(-1, nan, is_deferred=True),
    )
    result = Result(1, 0, rows)
    assert decode_result(encode_result(result)) == result


@pytest.mark.parametrize("matcher_ns", [0, 1_000_000, MAX_MATCHER_NS])
def test_the_time_of_a_matcher_arrives_with_its_row(matcher_ns: int) -> None:
    rows = (RowResult(3, -1.0, matcher_ns=matcher_ns), RowResult(4, -2.0, ((4, -2.0),), matcher_ns=matcher_ns))
    decoded = decode_result(encode_result(Result(1, 0, rows)))
    assert decoded.rows == rows and [row.matcher_ns for row in decoded.rows] == [matcher_ns] * 2


@pytest.mark.parametrize("matcher_ns", [MAX_MATCHER_NS + 1, 1 << 40, (1 << 64) - 1])
def test_a_longer_time_than_any_matcher_takes_is_refused(matcher_ns: int) -> None:
    with pytest.raises(ProtocolError, match=f"matcher_ns is {matcher_ns}"):
        decode_result(encode_result(Result(1, 0, (RowResult(3, -1.0, matcher_ns=matcher_ns),))))


@pytest.mark.parametrize(
    "inputs",
    [
        SamplingInputs(1, 0, (row(1, MAX_CONTEXT_TOKENS + 1),)),
        starts(MatcherStart(1, Grammar(""))),
        starts(MatcherStart(1, Grammar("x" * (MAX_GRAMMAR_BYTES + 1)))),
        starts(MatcherStart(1, Grammar("x", ("t",) * 65))),
        starts(MatcherStart(1, Grammar("x", ("t" * 1025,)))),
        starts(MatcherStart(1, Grammar("x"), (MAX_VOCABULARY,))),
        reasons(None),
        reasons(Reasoning((), ("b",))),
        reasons(Reasoning(("a",), ())),
        reasons(Reasoning(("a",), ("",))),
        reasons(Reasoning(("a",), ("b" * 1025,))),
        reasons(Reasoning(("a",), ("b",) * 65)),
        reasons(Reasoning(("a",), ("b",), (MAX_VOCABULARY,))),
        reasons(Reasoning(("a",), ("b",), (1,) * (MAX_REASONING_END_TOKENS + 1))),
        reasons(Reasoning(("a",), ("b",), (1,), MAX_CONTEXT_TOKENS + 1)),
    ],
)
def test_grammars_out_of_bounds_are_refused(inputs: SamplingInputs) -> None:
    with pytest.raises(ProtocolError):
        decode_inputs(encode_inputs(inputs))


def test_a_grammar_that_is_not_in_the_message_is_refused() -> None:
    message = sampling_pb2.SamplingInputs.FromString(encode_inputs(starts(MatcherStart(1, Grammar("x")))))
    message.starts.ClearField("grammars")
    with pytest.raises(ProtocolError, match="grammar is 0"):
        decode_inputs(message.SerializeToString())


def test_too_many_forced_tokens_are_refused() -> None:
    with pytest.raises(ProtocolError, match="forced tokens is 65"):
        decode_result(encode_result(Result(1, 0, (RowResult(3, -1.0, forced=(4,) * 65),))))
    with pytest.raises(ProtocolError, match="forced_draft tokens is 65"):
        decode_result(encode_result(Result(1, 0, (RowResult(3, -1.0, forced_draft=(4,) * 65),))))
    with pytest.raises(ProtocolError, match="token is"):
        decode_result(encode_result(Result(1, 0, (RowResult(3, -1.0, forced_draft=(MAX_VOCABULARY,)),))))

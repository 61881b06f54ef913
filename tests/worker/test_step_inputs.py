"""Sampling inputs that are read natively sample what those of the codec do, and their results have the same bytes."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import accumulate, chain, repeat

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamaclust.core.errors import ProtocolError
from llamaclust.core.limits import MAX_BATCH_TOKENS, MAX_TOP_LOGPROBS, MAX_VOCABULARY
from llamaclust.core.sampler_chain import SamplerChain
from llamaclust.core.sampling import (
    PARAMS,
    Grammar,
    MatcherRow,
    MatcherStart,
    RowTask,
    SampleTask,
    SamplingParams,
    ScoreTask,
)
from llamaclust.core.sampling_bounds import MAX_CONTEXT_TOKENS
from llamaclust.kernels.sampling import Sampler, row_results
from llamaclust.proto import sampling_pb2
from llamaclust.wire.microbatch.codec import decode_inputs, encode_inputs, encode_microbatch, encode_result
from llamaclust.wire.microbatch.frames import encode_hidden
from llamaclust.wire.microbatch.messages import Chunk, Microbatch, Result, SampledTokens, SamplingInputs, StageTiming
from llamaclust.worker.stage.sampled_tokens import SampledTokensBox
from llamaclust.worker.stage.step_inputs import StepInputs, inputs_reader
from support.arithmetic.sampling_cases import numbers_within
from support.wire.frame_reader import MODEL_ID, reader

VOCABULARY = 50
MOST_ROWS = 40  # that are sampled in a test

uint64 = st.integers(0, 2**64 - 1)
tokens = st.integers(0, VOCABULARY)  # the last one is foreign
params = st.builds(SamplingParams, **{**numbers_within(PARAMS), "top_k": st.integers(0, 9) | st.just(2**31 - 1)})
samples = st.builds(
    SampleTask,
    params,
    uint64,
    st.integers(0, 2**32 - 1),
    st.integers(0, MAX_CONTEXT_TOKENS - 9),
    st.lists(tokens, max_size=4).map(tuple),
    st.lists(tokens, max_size=4).map(tuple),
    st.integers(0, 3) | st.just(MAX_TOP_LOGPROBS),
    st.integers(0, 4),
    st.none() | st.integers(0, 5),
)
in_a_row = st.tuples(samples, st.integers(0, 3)).map(
    lambda pair: tuple(accumulate(repeat(pair[0], 1 + pair[1]), lambda task, _: task.next()))
)
scores = st.builds(ScoreTask, tokens, st.integers(0, 3)).map(lambda task: (task,))
usual = st.builds(
    SamplingInputs,
    uint64,
    uint64,
    st.lists(in_a_row | scores, max_size=4).map(lambda tasks: tuple(chain.from_iterable(tasks))),
)


def logits_of(rows: int, seed: int) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    """[rows, vocabulary], with values that are equal."""
    return np.random.default_rng(seed).normal(0, 3, (rows, VOCABULARY)).round(1).astype(np.float32)


def check_equal(data: bytes, inputs: SamplingInputs, seed: int) -> None:
    native = inputs_reader().read(data)
    assert native is not None
    assert (native.epoch, native.number, native.rows) == (inputs.epoch, inputs.number, len(inputs.tasks))
    if native.rows <= MOST_ROWS:
        sampler, logits = Sampler(VOCABULARY, "generic"), logits_of(native.rows, seed)
        rows = sampler.run(logits, inputs.tasks) if inputs.tasks else ()
        assert repr(row_results(sampler.sample(logits, native))) == repr(rows)


@settings(max_examples=300, deadline=None)
@given(usual, st.integers(0, 99))
def test_usual_inputs_sample_the_same_tokens(inputs: SamplingInputs, seed: int) -> None:
    data = encode_inputs(inputs)
    assert decode_inputs(data) == inputs
    check_equal(data, inputs, seed)
    assert StepInputs.read(data).inputs == inputs


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """Inputs of which some bytes are others, missing, or there twice."""
    data = bytearray(encode_inputs(draw(usual)))
    for _ in range(draw(st.integers(1, 3))):
        start, end = sorted((draw(st.integers(0, len(data))), draw(st.integers(0, len(data)))))
        part = draw(st.sampled_from([b"", bytes(data[start:end]) * 2, b"\x00", b"\x80\x01", b"\xff" * 10]))
        other = draw(st.binary(min_size=1, max_size=2))
        data[start:end] = draw(st.sampled_from([part, other, bytes(data[start:end]) + other]))
    return bytes(data)


@settings(max_examples=1500, deadline=None)
@given(damaged() | st.binary(max_size=60))
def test_no_bytes_are_read_otherwise_than_by_the_codec(data: bytes) -> None:
    if inputs_reader().read(data) is not None:
        check_equal(data, decode_inputs(data), 1)


@pytest.mark.parametrize("length_bytes", range(1, 12))
def test_lengths_have_as_many_bytes_as_the_codec_takes(length_bytes: int) -> None:
    data = encode_inputs(SamplingInputs(1, 2, (ScoreTask(11),)))
    before, task = data.split(b"\x1a\x04")
    more = length_bytes - 1
    length = bytes((4 | (0x80 if more else 0),)) + b"\x80" * (more - 1) + b"\0" * min(more, 1)
    lengthened = before + b"\x1a" + length + task
    if length_bytes > 5:
        assert inputs_reader().read(lengthened) is None
        with pytest.raises(ProtocolError):
            decode_inputs(lengthened)
    else:
        check_equal(lengthened, decode_inputs(lengthened), 1)


TASK = SampleTask(SamplingParams(), 1, 0, 5)
UNUSUAL = {
    "DRY's window": replace(TASK, dry_window=0),
    "breakers": replace(TASK, breakers=((1,),)),
    "mu": replace(TASK, mu=1.0),
    "matcher": replace(TASK, matcher=MatcherRow(0, 0)),
    "biases": replace(TASK, params=SamplingParams(logit_bias=((1, 2.0),))),
    "chain": replace(TASK, params=SamplingParams(chain=SamplerChain(()))),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_what_is_not_usual_is_left_to_the_codec(name: str) -> None:
    inputs = SamplingInputs(1, 2, (TASK, UNUSUAL[name]))
    received = StepInputs.read(encode_inputs(inputs))
    assert received.native is None
    assert (received.epoch, received.number, received.inputs) == (1, 2, inputs)


def test_answers_that_start_or_end_are_left_to_the_codec() -> None:
    start = MatcherStart(7, Grammar("{}"))
    for inputs in (SamplingInputs(1, 2, (TASK,), released=(3,)), SamplingInputs(1, 2, (TASK,), starts=(start,))):
        assert StepInputs.read(encode_inputs(inputs)).native is None


BEYOND: dict[str, tuple[RowTask, int]] = {
    "temperature": (replace(TASK, params=SamplingParams(temperature=100.1)), 0),
    "no number": (replace(TASK, params=SamplingParams(top_p=math.nan)), 0),
    "top_logprobs": (replace(TASK, top_logprobs=MAX_TOP_LOGPROBS + 1), 0),
    "top_k": (replace(TASK, params=SamplingParams(top_k=2**31)), 0),
    "position": (replace(TASK, position=MAX_CONTEXT_TOKENS + 1), 0),
    "last position": (replace(TASK, position=MAX_CONTEXT_TOKENS - 1), 2),
    "rows": (TASK, MAX_BATCH_TOKENS),
    "suppressed": (replace(TASK, suppressed=(MAX_VOCABULARY,)), 0),
    "tokens": (replace(TASK, suppressed=(1,) * 20000), 8000),
    "token of a history": (replace(TASK, history=(MAX_VOCABULARY,)), 0),
    "history": (replace(TASK, history=(1,) * (MAX_CONTEXT_TOKENS + 1)), 0),
    "rows of a history": (replace(TASK, history_rows=MAX_BATCH_TOKENS + 1), 0),
    "window": (replace(TASK, penalty_window=MAX_CONTEXT_TOKENS + 1), 0),
    "token": (ScoreTask(MAX_VOCABULARY), 0),
}


@pytest.mark.parametrize("name", BEYOND)
def test_what_is_beyond_the_bounds_is_refused_by_both(name: str) -> None:
    task, further = BEYOND[name]
    message = sampling_pb2.SamplingInputs.FromString(encode_inputs(SamplingInputs(1, 2, (task,))))
    if further:
        message.tasks[0].sample.further_rows = further
    data = message.SerializeToString()
    assert inputs_reader().read(data) is None
    with pytest.raises(ProtocolError):
        StepInputs.read(data)


@settings(max_examples=200, deadline=None)
@given(usual, st.lists(st.builds(StageTiming, uint64, uint64, uint64, st.integers(1, 9)), max_size=3), st.data())
def test_results_have_the_bytes_that_the_codec_makes(
    inputs: SamplingInputs, before: list[StageTiming], data: st.DataObject
) -> None:
    epoch, number = data.draw(uint64), data.draw(uint64)
    microbatch = Microbatch(MODEL_ID, epoch, number, (Chunk((1, 2), 4, (0, 1), 0),))
    frame = reader().read(encode_hidden(encode_microbatch(microbatch), tuple(before), None))
    tasks = inputs_reader().read(encode_inputs(inputs))
    assert frame is not None
    assert tasks is not None
    logits = logits_of(tasks.rows, 5)
    if data.draw(st.booleans()):
        logits[:, 1:] = -np.inf  # logprobs of 0
    outcomes = Sampler(VOCABULARY, "generic").sample(logits, tasks)
    timing = StageTiming(data.draw(uint64), data.draw(uint64), data.draw(uint64), 2)
    rows = row_results(outcomes)
    assert outcomes.has_failures == any(row.failure is not None for row in rows)
    if outcomes.has_failures:
        with pytest.raises(ValueError, match="no answer"):
            outcomes.result(frame, timing.queue_ns, timing.compute_ns, timing.wire_ns)
        return
    assert outcomes.tokens == [row.token for row in rows]
    native = outcomes.result(frame, timing.queue_ns, timing.compute_ns, timing.wire_ns)
    assert native == encode_result(Result(epoch, number, rows, (*before, timing)))


def chunk_of(tokens: tuple[int, ...], outputs: int) -> Chunk:
    is_known = tokens != (0,)
    return Chunk(tokens, 4, (0, 1), min(outputs, len(tokens)), None if is_known else (5, 1))


chunks = st.builds(
    chunk_of, st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=4).map(tuple), st.integers(0, 4)
)


@settings(max_examples=400, deadline=None)
@given(st.lists(chunks, min_size=1, max_size=3), st.data())
def test_histories_go_on_with_the_chunk_s_tokens_by_both_ways(work: list[Chunk], data: st.DataObject) -> None:
    outputs = sum(chunk.outputs for chunk in work)
    tasks = data.draw(st.lists(samples | scores.map(lambda one: one[0]), min_size=outputs, max_size=outputs))
    inputs = SamplingInputs(1, 9, tuple(tasks))
    microbatch = Microbatch(MODEL_ID, 1, 9, tuple(work))
    frame = reader().read(encode_hidden(encode_microbatch(microbatch), (), None))
    box = SampledTokensBox()
    box.put(SampledTokens(5, (3, 7)))
    if frame is None:  # more than its limits
        return
    received = StepInputs.read(encode_inputs(inputs))
    assert received.native is not None
    native = received.tasks(frame, box)
    try:
        expected = box.fill_inputs(inputs, microbatch)
    except ProtocolError:
        assert native is None
        return
    assert native is not None
    sampler, logits = Sampler(VOCABULARY, "generic"), logits_of(outputs, 3)
    rows = sampler.run(logits, expected.tasks) if outputs else ()
    assert repr(row_results(sampler.sample(logits, native))) == repr(rows)


def test_histories_wait_for_tokens_that_are_not_known() -> None:
    work = (Chunk((0,), 4, (0, 1), 1, (5, 1)),)
    frame = reader().read(encode_hidden(encode_microbatch(Microbatch(MODEL_ID, 1, 9, work)), (), None))
    received = StepInputs.read(encode_inputs(SamplingInputs(1, 9, (replace(TASK, history_rows=1),))))
    assert frame is not None
    assert received.tasks(frame, SampledTokensBox()) is None


def test_rows_without_an_answer_are_told_from_others() -> None:
    tasks = inputs_reader().read(encode_inputs(SamplingInputs(1, 2, (TASK, TASK))))
    assert tasks is not None
    logits = logits_of(2, 1)
    logits[1, 3] = np.nan
    outcomes = Sampler(VOCABULARY, "generic").sample(logits, tasks)
    assert outcomes.has_failures
    assert [row.failure is None for row in row_results(outcomes)] == [True, False]

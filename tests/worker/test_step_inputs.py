"""Tests of native readers and writers of sampling inputs and results against the plain ones."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import accumulate, chain, repeat

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamaclust.core.errors import ProtocolError
from llamaclust.core.limits import MAX_BATCH_TOKENS, MAX_TOP_LOGPROBS
from llamaclust.core.sampler.bounds import MAX_CONTEXT_TOKENS, MAX_VOCABULARY
from llamaclust.core.sampler.matchers import Grammar, MatcherStart, Reasoning
from llamaclust.core.sampler.params import CHAIN, PARAMS, SAMPLERS, SamplerChain, SamplingParams
from llamaclust.core.sampler.results import RowResult
from llamaclust.core.sampler.tasks import MatcherRow, RowTask, SampleTask, ScoreTask
from llamaclust.kernels._native import RowOutcomes
from llamaclust.kernels.sampling import Sampler, row_results, set_result
from llamaclust.wire.microbatch.codec import encode_microbatch
from llamaclust.wire.microbatch.frames import encode_hidden
from llamaclust.wire.microbatch.inputs import encode_inputs
from llamaclust.wire.microbatch.messages import Chunk, Microbatch, Result, SampledTokens, SamplingInputs, StageTiming
from llamaclust.wire.microbatch.results import decode_result
from llamaclust.worker.stage.matched_answer import DEFERRED
from llamaclust.worker.stage.step_inputs import StepInputs
from support.arithmetic.sampled import second_draw
from support.arithmetic.sampling_cases import numbers_within
from support.wire.frame_reader import MODEL_ID, reader
from support.wire.plain_tokens import PlainTokensBox
from support.wire.slow_codec import decode_inputs, encode_frame, encode_result

VOCABULARY = 50
MOST_ROWS = 40  # sampled in a test

uint64 = st.integers(0, 2**64 - 1)
tokens = st.integers(0, VOCABULARY)  # the last one is invalid
params = st.builds(SamplingParams, **{**numbers_within(PARAMS), "top_k": st.integers(0, 9) | st.just(2**31 - 1)})
chains = st.builds(
    SamplerChain,
    order=st.lists(st.sampled_from(SAMPLERS), unique=True).map(tuple),
    unpenalized=st.lists(tokens, max_size=3).map(tuple),
    **numbers_within(CHAIN),
)
with_more = st.builds(
    replace,
    params,
    logit_bias=st.lists(st.tuples(tokens, st.floats(-9, 9, width=32)), max_size=3).map(tuple),
    chain=st.none() | chains,
)
samples = st.builds(
    SampleTask,
    params | with_more,
    uint64,
    st.integers(0, 2**32 - 1),
    st.integers(0, MAX_CONTEXT_TOKENS - 9),
    st.lists(tokens, max_size=4).map(tuple),
    st.lists(tokens, max_size=4).map(tuple),
    st.integers(0, 3) | st.just(MAX_TOP_LOGPROBS),
    st.integers(0, 4),
    st.none() | st.integers(0, 5),
    st.none() | st.integers(0, 5),
    st.lists(st.lists(tokens, min_size=1, max_size=3).map(tuple), max_size=2).map(tuple),
    st.sampled_from((0.0, 2.5)),
    st.none() | st.builds(MatcherRow, uint64, st.integers(0, 9)),
)
in_a_row = st.tuples(samples, st.integers(0, 3)).map(
    lambda pair: tuple(accumulate(repeat(pair[0], 1 + pair[1]), lambda task, _: task.next()))
)
scores = st.builds(ScoreTask, tokens, st.integers(0, 3)).map(lambda task: (task,))
reasonings = st.builds(Reasoning, st.just(("a",)), st.just(("b",)), forced=st.lists(tokens, max_size=2).map(tuple))
starts = st.builds(MatcherStart, uint64, st.just(Grammar("{}")), st.just((1, 2)), st.none() | reasonings)
some_inputs = st.builds(
    SamplingInputs,
    uint64,
    uint64,
    st.lists(in_a_row | scores, max_size=4).map(lambda tasks: tuple(chain.from_iterable(tasks))),
    st.lists(uint64, max_size=2).map(tuple),
    st.lists(starts, max_size=2).map(tuple),
)
a_timing = st.builds(StageTiming, uint64, uint64, uint64, st.integers(1, 9))


def logits_of(rows: int, seed: int) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    """Returns logits [rows, vocabulary]; some of them are equal."""
    return np.random.default_rng(seed).normal(0, 3, (rows, VOCABULARY)).round(1).astype(np.float32)


def check_equal(data: bytes, inputs: SamplingInputs, seed: int) -> None:
    """Checks that both readers read the same inputs, which give the same samples."""
    assert decode_inputs(data) == inputs
    tasks = StepInputs.read(data).tasks
    if len(inputs.tasks) <= MOST_ROWS:
        sampler, logits = Sampler(VOCABULARY, "generic"), logits_of(tasks.rows, seed)
        rows = sampler.run(logits, inputs.tasks) if inputs.tasks else ()
        assert repr(row_results(sampler.sample(logits, tasks))) == repr(rows)


@settings(max_examples=300, deadline=None)
@given(some_inputs, st.integers(0, 99))
def test_inputs_sample_the_same_tokens(inputs: SamplingInputs, seed: int) -> None:
    check_equal(encode_inputs(inputs), inputs, seed)


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """Draws inputs of which some bytes are changed, missing or repeated."""
    data = bytearray(encode_inputs(draw(some_inputs)))
    for _ in range(draw(st.integers(1, 3))):
        start, end = sorted((draw(st.integers(0, len(data))), draw(st.integers(0, len(data)))))
        part = draw(st.sampled_from([b"", bytes(data[start:end]) * 2, b"\x00", b"\x80\x01", b"\xff" * 10]))
        other = draw(st.binary(min_size=1, max_size=2))
        data[start:end] = draw(st.sampled_from([part, other, bytes(data[start:end]) + other]))
    return bytes(data)


@settings(max_examples=1500, deadline=None)
@given(damaged() | st.binary(max_size=60))
def test_damaged_bytes_are_read_as_the_plain_reader_reads_them_or_refused(data: bytes) -> None:
    try:
        inputs = decode_inputs(data)
    except ProtocolError:
        return
    check_equal(data, inputs, 1)


TASK = SampleTask(SamplingParams(), 1, 0, 5)
UNPENALIZED = SamplingParams(chain=SamplerChain(unpenalized=(1,) * 20000))
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
    "unpenalized": (replace(TASK, params=UNPENALIZED), 8000),
    "unpenalized of a chain": (replace(TASK, params=UNPENALIZED, mu=2.5), 2000),
    "token of a history": (replace(TASK, history=(MAX_VOCABULARY,)), 0),
    "history": (replace(TASK, history=(1,) * (MAX_CONTEXT_TOKENS + 1)), 0),
    "rows of a history": (replace(TASK, history_rows=MAX_BATCH_TOKENS + 1), 0),
    "window": (replace(TASK, penalty_window=MAX_CONTEXT_TOKENS + 1), 0),
    "token": (ScoreTask(MAX_VOCABULARY), 0),
}


@pytest.mark.parametrize("name", BEYOND)
def test_what_is_beyond_the_bounds_is_refused(name: str) -> None:
    task, further = BEYOND[name]
    tasks = [task]
    for _ in range(further):
        last = tasks[-1]
        assert isinstance(last, SampleTask)
        tasks.append(last.next())
    with pytest.raises(ProtocolError):
        StepInputs.read(encode_inputs(SamplingInputs(1, 2, tuple(tasks))))


tokens_behind = st.lists(st.integers(0, MAX_VOCABULARY - 1), max_size=3).map(tuple)
answers = st.builds(
    RowResult,
    st.integers(0, MAX_VOCABULARY - 1),
    st.floats(-100, 0, width=32),
    st.lists(st.tuples(st.integers(0, 9), st.floats(-100, 0, width=32)), max_size=2).map(tuple),
    mu=st.none() | st.floats(-9, 9),
    forced=tokens_behind,
    forced_draft=tokens_behind,
    drafted=tokens_behind,
    matcher_ns=st.integers(0, 2),
)
failed = RowResult(-1, math.nan, failure="no")
unanswered = st.sampled_from([DEFERRED, failed, replace(failed, is_request_fault=True)])


@settings(max_examples=200, deadline=None)
@given(st.lists(answers | unanswered, max_size=4), st.booleans(), st.lists(a_timing, max_size=3), a_timing, st.data())
def test_results_are_written_as_the_plain_writer_writes_them(
    rows: list[RowResult], has_failed: bool, before: list[StageTiming], timing: StageTiming, data: st.DataObject
) -> None:
    epoch, number, drafting_ns = data.draw(uint64), data.draw(uint64), data.draw(st.integers(0, 9))
    microbatch = Microbatch(MODEL_ID, epoch, number, (Chunk((1, 2), 4, (0, 1), 0),))
    frame = reader().read(encode_frame(encode_microbatch(microbatch), before))
    if has_failed:
        result = Result(epoch, number, (), tuple(before), "no")
        assert RowOutcomes().result(frame, None, "no") == encode_result(result)
        assert decode_result(encode_result(result)) == result
        return
    tasks = StepInputs.read(encode_inputs(SamplingInputs(1, 2, (TASK,) * len(rows)))).tasks
    outcomes = Sampler(VOCABULARY, "generic").sample(logits_of(len(rows), 5), tasks)
    for place, row in enumerate(rows):
        set_result(outcomes, place, row)
        outcomes.set_drafted(place, row.drafted)
    assert repr(row_results(outcomes)) == repr(tuple(rows))
    assert outcomes.tokens == [max(row.token, 0) for row in rows]
    result = Result(epoch, number, tuple(rows), (*before, timing), embeddings=b"\0\1\2\3", drafting_ns=drafting_ns)
    numbers = timing.queue_ns, timing.compute_ns, timing.wire_ns, 2
    result = replace(result, timings=(*before, replace(timing, rows=2)))
    native = outcomes.result(frame, numbers, embeddings=result.embeddings, drafting_ns=drafting_ns)
    assert native == encode_result(result)
    assert repr(decode_result(native)) == repr(result)


def chunk_of(tokens: tuple[int, ...], outputs: int) -> Chunk:
    is_known = tokens != (0,)
    return Chunk(tokens, 4, (0, 1), min(outputs, len(tokens)), None if is_known else (5, 1))


chunks = st.builds(
    chunk_of, st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=4).map(tuple), st.integers(0, 4)
)


@settings(max_examples=400, deadline=None)
@given(st.lists(chunks, min_size=1, max_size=3), st.data())
def test_histories_go_on_with_the_chunk_s_tokens(work: list[Chunk], data: st.DataObject) -> None:
    outputs = sum(chunk.outputs for chunk in work)
    tasks = data.draw(st.lists(samples | scores.map(lambda one: one[0]), min_size=outputs, max_size=outputs))
    inputs = SamplingInputs(1, 9, tuple(tasks))
    microbatch = Microbatch(MODEL_ID, 1, 9, tuple(work))
    box = PlainTokensBox()
    box.put(SampledTokens(5, (3, 7)))
    try:
        frame = reader().read(encode_hidden(encode_microbatch(microbatch)))
    except ProtocolError:  # exceeds its limits
        return
    box.fill(frame)
    native = StepInputs.read(encode_inputs(inputs))
    try:
        expected = box.fill_inputs(inputs, microbatch)
    except ProtocolError as error:
        with pytest.raises(ProtocolError, match=f"^{error}$"):
            native.tasks.complete(frame)
        return
    native.tasks.complete(frame)
    sampler, logits = Sampler(VOCABULARY, "generic"), logits_of(outputs, 3)
    rows = sampler.run(logits, expected.tasks) if outputs else ()
    assert repr(row_results(sampler.sample(logits, native.tasks))) == repr(rows)
    matched = [task.matcher for task in expected.tasks if isinstance(task, SampleTask) and task.matcher is not None]
    assert [MatcherRow(key, place, token) for _, key, place, token in native.tasks.matcher_rows] == matched


def test_tasks_that_are_not_as_many_as_output_rows_are_refused() -> None:
    work = Microbatch(MODEL_ID, 1, 9, (Chunk((1,), 4, (0, 1), 1),))
    frame = reader().read(encode_hidden(encode_microbatch(work)))
    with pytest.raises(ProtocolError, match="2 tasks for 1 output rows"):
        StepInputs.read(encode_inputs(SamplingInputs(1, 9, (TASK, TASK)))).tasks.complete(frame)


def test_rows_that_are_drawn_again_choose_among_allowed_tokens() -> None:
    """Both samplers draw equal tokens with the same parameters, another key and a grammar's allowed tokens."""
    tasks = tuple(replace(TASK, seed=seed, params=SamplingParams(temperature=3.0)) for seed in range(9))
    native = StepInputs.read(encode_inputs(SamplingInputs(1, 2, tasks))).tasks
    allowed = [np.array([3 << place, 1], np.uint32) for place in (2, 5)]
    sampler, logits = Sampler(VOCABULARY, "generic"), logits_of(2, 3)
    found = row_results(sampler.sample(logits, native.second_draws([2, 5], allowed)))
    assert found == sampler.run(logits, tuple(second_draw(tasks[place]) for place in (2, 5)), allowed)


def test_a_row_may_choose_suppressed_tokens_where_nothing_else_may_follow() -> None:
    """Other rows still may not, although they share the list of suppressed tokens."""
    suppressed = tuple(range(VOCABULARY - 1))
    native = StepInputs.read(encode_inputs(SamplingInputs(1, 2, (replace(TASK, suppressed=suppressed),) * 3))).tasks
    native.allow_suppressed(1)
    logits = logits_of(3, 3)
    logits[:, 7] = 99.0
    found = [row.token for row in row_results(Sampler(VOCABULARY, "generic").sample(logits, native))]
    assert found == [VOCABULARY - 1, 7, VOCABULARY - 1]


def test_drafts_are_drawn_as_later_tokens_without_what_came_before() -> None:
    params = SamplingParams(2.0, 9, repetition_penalty=2.0, presence_penalty=1.0, logit_bias=((3, 2.0),))
    task = replace(TASK, params=params, history=(1, 2), suppressed=(7,), top_logprobs=3)
    native = StepInputs.read(encode_inputs(SamplingInputs(1, 2, (ScoreTask(1), task)))).tasks
    later = replace(
        task,
        params=replace(params, repetition_penalty=1.0, presence_penalty=0.0),
        history=(),
        top_logprobs=0,
        position=task.position + 4,
    )
    sampler, logits = Sampler(VOCABULARY, "generic"), logits_of(1, 3)
    assert row_results(sampler.sample(logits, native.drafts([1], 4))) == sampler.run(logits, (later,))

"""Tests of the encoding of messages and frames. Hostile bytes only cause errors."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import math
import struct
import sys
from dataclasses import replace
from itertools import chain
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamaclust.core.errors import ProtocolError
from llamaclust.core.limits import (
    MAX_ADAPTER_SCALE,
    MAX_ADAPTERS,
    MAX_BATCH_TOKENS,
    MAX_KV_BLOCKS,
    MAX_SEQUENCES,
    MAX_TOP_LOGPROBS,
)
from llamaclust.core.sampler.bounds import MAX_CONTEXT_TOKENS, MAX_VOCABULARY
from llamaclust.core.sampler.params import CHAIN, PARAMS, SAMPLERS, SamplerChain, SamplerName, SamplingParams
from llamaclust.core.sampler.results import RowResult
from llamaclust.core.sampler.tasks import SampleTask, ScoreTask
from llamaclust.proto import sampling_pb2
from llamaclust.wire.microbatch.codec import encode_microbatch, encode_sampled_tokens
from llamaclust.wire.microbatch.inputs import encode_inputs
from llamaclust.wire.microbatch.messages import (
    Chunk,
    Microbatch,
    Result,
    SampledTokens,
    SamplingInputs,
    StageTiming,
)
from llamaclust.wire.microbatch.results import decode_result
from support.arithmetic.sampling_cases import numbers_within
from support.paths import ROOT
from support.wire.image_rows import FAULTY_IMAGE_ROWS, image_rows
from support.wire.rows_of_tasks import chained, in_a_row
from support.wire.slow_codec import (
    decode_frame,
    decode_inputs,
    decode_microbatch,
    decode_sampled_tokens,
    encode_frame,
    encode_result,
)

PROTO = ROOT / "proto"


tokens = st.integers(0, MAX_VOCABULARY - 1)
uint64 = st.integers(0, 2**64 - 1)
reals = st.floats(-100, 100, width=32)
logprobs = st.floats(width=32, allow_nan=False, allow_infinity=False)
tops = st.lists(st.tuples(tokens, logprobs), max_size=3).map(tuple)
runs = st.tuples(st.integers(0, MAX_KV_BLOCKS - 1000), st.integers(10, 1000))
chunks = st.lists(tokens, min_size=1, max_size=9).flatmap(
    lambda ids: st.builds(
        Chunk,
        st.just(tuple(ids)),
        st.integers(0, 150),
        st.lists(runs, min_size=1, max_size=4).map(lambda runs: tuple(chain.from_iterable(runs))),
        st.integers(0, len(ids)),
        st.none(),
        st.lists(runs, min_size=1, max_size=4).map(lambda runs: tuple(chain.from_iterable(runs))),
        st.integers(0, MAX_CONTEXT_TOKENS // 16),
        st.sampled_from([(0, 0), (0, 1)]),
        st.sampled_from([(), ((0, 1.0),), ((3, -0.5), (15, MAX_ADAPTER_SCALE))]),
        images=st.none() | st.integers(0, len(ids) - 1).flatmap(lambda first: image_rows(len(ids), first)),
    )
)
many_chunks = st.lists(chunks, min_size=1, max_size=5).map(tuple)
followers = st.builds(
    Chunk,
    st.just((0,)),
    st.integers(0, 99),
    st.just((0, 9)),
    st.integers(0, 1),
    st.tuples(st.integers(0, 99), st.integers(0, 8191)),
)
microbatches = st.builds(Microbatch, st.text("0123456789abcdef", max_size=64), uint64, uint64, many_chunks) | st.builds(
    Microbatch,
    st.just("ab"),
    uint64,
    st.integers(100, 2**64 - 1),
    st.lists(followers, min_size=1, max_size=5).map(tuple),
)
params = st.builds(
    SamplingParams,
    **numbers_within(PARAMS),
    logit_bias=st.lists(st.tuples(tokens, reals), max_size=3).map(tuple),
    chain=st.none()
    | st.builds(
        SamplerChain,
        order=st.lists(st.sampled_from(SAMPLERS), unique=True).map(tuple),
        unpenalized=st.lists(tokens, max_size=3).map(tuple),
        **numbers_within(CHAIN),
    ),
)
windows = st.none() | st.integers(0, MAX_CONTEXT_TOKENS)
sequences = st.lists(st.lists(tokens, min_size=1, max_size=3).map(tuple), max_size=3).map(tuple)
ids = st.lists(tokens, max_size=5).map(tuple)
samples = st.builds(
    SampleTask,
    params,
    uint64,
    st.integers(0, 2**32 - 1),
    st.integers(0, MAX_CONTEXT_TOKENS - 9),
    ids,
    ids,
    st.integers(0, 128),
    st.integers(0, MAX_BATCH_TOKENS - 9),
    windows,
    windows,
    sequences,
    st.floats(-1e12, 1e12),
)
scores = st.tuples(st.builds(ScoreTask, tokens, st.integers(0, 128)))
tasks = st.lists(st.builds(in_a_row, samples, st.integers(1, 9)) | scores, max_size=4).map(chained)
inputs = st.builds(SamplingInputs, uint64, uint64, tasks)
a_timing = st.builds(StageTiming, uint64, uint64, uint64, st.integers(1, MAX_BATCH_TOKENS))
timings = st.lists(a_timing, max_size=3).map(tuple)
a_row = st.builds(RowResult, tokens, logprobs, tops, mu=st.none() | st.floats(-1e12, 1e12))
rows = st.lists(a_row, max_size=4).map(tuple)
lines = st.text(st.characters(codec="ascii", categories=("L", "N")), min_size=1, max_size=50)
embeddings = st.binary(max_size=3).map(lambda data: data * 4)
results = st.builds(Result, uint64, uint64, rows, timings, st.none() | lines, embeddings)


@given(microbatches, inputs, results)
def test_what_is_sent_arrives(microbatch: Microbatch, wanted: SamplingInputs, result: Result) -> None:
    assert decode_microbatch(encode_microbatch(microbatch)) == microbatch
    assert decode_inputs(encode_inputs(wanted)) == wanted
    assert decode_result(encode_result(result)) == result


@given(st.builds(SampledTokens, uint64, ids))
def test_sampled_tokens_arrive(sampled: SampledTokens) -> None:
    assert decode_sampled_tokens(encode_sampled_tokens(sampled)) == sampled


@pytest.mark.parametrize(
    "bad", [SampledTokens(1, (MAX_VOCABULARY,)), SampledTokens(1, (0,) * (MAX_BATCH_TOKENS + 1))], ids=["id", "many"]
)
def test_sampled_tokens_out_of_bounds_are_refused(bad: SampledTokens) -> None:
    with pytest.raises(ProtocolError):
        decode_sampled_tokens(encode_sampled_tokens(bad))


def test_a_failed_row_arrives_alone() -> None:
    fault = RowResult(-1, math.nan, failure="the grammar became too complex", is_request_fault=True)
    rows = (RowResult(3, -1.5), RowResult(-1, math.nan, failure="logits are not finite"), fault)
    decoded = decode_result(encode_result(Result(1, 2, rows)))
    assert decoded.rows[0] == rows[0]
    failed = decoded.rows[1]
    assert (failed.token, failed.failure, failed.is_request_fault) == (-1, "logits are not finite", False)
    assert (decoded.rows[2].failure, decoded.rows[2].is_request_fault) == (fault.failure, True)
    assert math.isnan(failed.logprob)


@pytest.mark.parametrize(
    "top",
    [
        ((1, -1.0), (2, math.nan)),
        ((1, math.inf), (2, -1.0)),
        ((1, -1.0), (2, -math.inf)),
        ((MAX_VOCABULARY, -1.0),),
        ((1, -1.0),) * 200,
    ],
    ids=["no number", "infinite", "minus infinite", "token", "many"],
)
def test_top_logprobs_that_cannot_be_are_refused(top: tuple[tuple[int, float], ...]) -> None:
    with pytest.raises(ProtocolError):
        decode_result(encode_result(Result(1, 2, (RowResult(3, -1.5, top),))))


@pytest.mark.parametrize("logprob", [math.nan, math.inf, -math.inf])
def test_a_chosen_token_without_a_finite_logprob_is_refused(logprob: float) -> None:
    """JSON has no such number, so the reply could not be written."""
    rows = (RowResult(3, -1.5), RowResult(4, logprob))
    with pytest.raises(ProtocolError, match="a logprob is not a finite number"):
        decode_result(encode_result(Result(1, 2, rows)))


def test_a_result_with_many_logprobs_takes_few_calls() -> None:
    """Decoding blocks the event loop, so it must take few calls."""
    top, calls = tuple((token, -float(token)) for token in range(MAX_TOP_LOGPROBS)), 0
    result = Result(1, 2, tuple(RowResult(token, -1.5, top) for token in range(64)))
    data = encode_result(result)

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event == "call"

    sys.setprofile(count)
    try:
        decoded = decode_result(data)
    finally:
        sys.setprofile(None)
    assert decoded == result and calls < 64 * MAX_TOP_LOGPROBS, "fewer than there are logprobs"


def test_unknown_fields_of_a_newer_minor_version_are_ignored() -> None:
    result = Result(1, 2, (RowResult(3, -1.5),))
    unknown = b"\xa2\x1f\x05hello"  # Field 500, five bytes.
    assert decode_result(encode_result(result) + unknown) == result


GOOD_CHUNK = Chunk((1, 2), 0, (0, 1), 1)
BAD_CHUNKS = {
    "no tokens": Chunk((), 0, (0, 1), 0),
    "token": Chunk((MAX_VOCABULARY,), 0, (0, 1), 0),
    "last position": Chunk((1, 2), MAX_CONTEXT_TOKENS - 1, (0, 1), 0),
    "outputs": Chunk((1, 2), 0, (0, 1), 3),
    "runs": Chunk((1,), 0, (), 0),
    "empty run": Chunk((1,), 0, (0, 0), 0),
    "last block": Chunk((1,), 0, (MAX_KV_BLOCKS - 1, 2), 0),
    "empty run of a window": Chunk((1,), 0, (0, 1), 0, None, (0, 0)),
    "window_start": Chunk((1,), 0, (0, 1), 0, None, (0, 1), MAX_CONTEXT_TOKENS + 1),
    **FAULTY_IMAGE_ROWS,
    "adapter": Chunk((1,), 0, (0, 1), 0, adapters=((MAX_ADAPTERS, 1.0),)),
    "adapter twice": Chunk((1,), 0, (0, 1), 0, adapters=((1, 1.0), (1, 1.0))),
    "scale": Chunk((1,), 0, (0, 1), 0, adapters=((0, math.nan),)),
    "large scale": Chunk((1,), 0, (0, 1), 0, adapters=((0, 2 * MAX_ADAPTER_SCALE),)),
    "follows itself": Chunk((0,), 0, (0, 1), 1, (7, 0)),
    "follows a row that cannot be": Chunk((0,), 0, (0, 1), 1, (6, MAX_BATCH_TOKENS)),
    "follows, and brings a token": Chunk((3,), 0, (0, 1), 1, (6, 0)),
    "follows with two rows": Chunk((0, 0), 0, (0, 1), 1, (6, 0)),
}


@pytest.mark.parametrize("name", BAD_CHUNKS)
def test_chunks_out_of_bounds_are_refused(name: str) -> None:
    assert decode_microbatch(encode_microbatch(Microbatch("m", 1, 7, (GOOD_CHUNK,))))
    with pytest.raises(ProtocolError):
        decode_microbatch(encode_microbatch(Microbatch("m", 1, 7, (BAD_CHUNKS[name],))))


def test_microbatches_out_of_bounds_are_refused() -> None:
    for chunk, count in ((GOOD_CHUNK, 0), (GOOD_CHUNK, MAX_SEQUENCES + 1), (Chunk((1,) * 8192, 0, (0, 1), 0), 2)):
        with pytest.raises(ProtocolError):
            decode_microbatch(encode_microbatch(Microbatch("m", 1, 0, (chunk,) * count)))


BAD_PARAMS = [
    SamplingParams(temperature=math.nan),
    SamplingParams(temperature=-1.0),
    SamplingParams(top_p=1.5),
    SamplingParams(min_p=math.inf),
    SamplingParams(temperature=100.5),
    SamplingParams(repetition_penalty=0.0),
    SamplingParams(presence_penalty=1001.0),
    SamplingParams(logit_bias=((5, 2e9),)),
    SamplingParams(frequency_penalty=math.nan),
    SamplingParams(logit_bias=((5, math.nan),)),
    SamplingParams(logit_bias=((MAX_VOCABULARY, 1.0),)),
    SamplingParams(chain=SamplerChain((SamplerName.XTC, SamplerName.XTC))),
    SamplingParams(chain=SamplerChain(typical_p=1.5)),
    SamplingParams(chain=SamplerChain(mirostat_tau=math.nan)),
    SamplingParams(chain=SamplerChain(mirostat=3)),
    SamplingParams(chain=SamplerChain(dry_allowed_length=0)),
    SamplingParams(chain=SamplerChain(unpenalized=(MAX_VOCABULARY,))),
]


@pytest.mark.parametrize("params", BAD_PARAMS)
def test_sampling_parameters_out_of_bounds_are_refused(params: SamplingParams) -> None:
    with pytest.raises(ProtocolError):
        decode_inputs(encode_inputs(SamplingInputs(1, 0, (SampleTask(params, 0, 0, 0),))))


@pytest.mark.parametrize(
    "fields",
    [
        {"mu": math.inf},
        {"mu": 1e13},
        {"penalty_window": MAX_CONTEXT_TOKENS + 1},
        {"dry_window": MAX_CONTEXT_TOKENS + 1},
        {"breakers": ((),)},
        {"breakers": ((1,) * 65,)},
        {"breakers": ((MAX_VOCABULARY,),)},
    ],
)
def test_what_a_chain_needs_out_of_bounds_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError):
        decode_inputs(encode_inputs(SamplingInputs(1, 0, (SampleTask(SamplingParams(), 0, 0, 0, **fields),))))


def test_an_unknown_step_is_refused() -> None:
    steps = sampling_pb2.SamplerChain(order=struct.pack("<i", 10), dry_base=1, dry_allowed_length=1)
    params = sampling_pb2.SamplingParams(chain=steps, repetition_penalty=1)
    with pytest.raises(ProtocolError, match="step is 10"):
        decode_inputs(sampling_pb2.SamplingInputs(params=[params.SerializeToString()]).SerializeToString())


@given(st.binary(max_size=200))
def test_random_bytes_are_refused_or_decoded(data: bytes) -> None:
    for decode in (decode_microbatch, decode_inputs, decode_result, decode_frame):
        with contextlib.suppress(ProtocolError):
            decode(data)


def _frame(rng: np.random.Generator) -> bytes:
    header = encode_microbatch(Microbatch("m", 1, 0, (GOOD_CHUNK,)))
    return encode_frame(header, (StageTiming(1, 2, 3, 4),), rng.standard_normal((2, 8), np.float32))


@settings(max_examples=300)
@given(st.data())
def test_damaged_frames_are_refused_or_decoded(data: st.DataObject) -> None:
    """Changes, cuts and extends valid messages, which tests more code than random bytes."""
    good = [
        (decode_frame, _frame(np.random.default_rng(1))),
        (decode_microbatch, encode_microbatch(Microbatch("m", 1, 0, (GOOD_CHUNK,) * 3))),
        (decode_inputs, encode_inputs(SamplingInputs(1, 0, (SampleTask(SamplingParams(), 1, 2, 3), ScoreTask(4))))),
    ]
    decode, message = data.draw(st.sampled_from(good))
    damaged = bytearray(message)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(damaged) - 1))
        damaged[at] = data.draw(st.integers(0, 255))
    cut = damaged[: data.draw(st.integers(0, len(damaged)))] if data.draw(st.booleans()) else damaged
    with contextlib.suppress(ProtocolError):
        decode(bytes(cut))


def test_a_frame_of_another_version_is_refused_by_name() -> None:
    data = bytearray(_frame(np.random.default_rng(3)))
    data[4] = 9
    with pytest.raises(ProtocolError, match="frame version 9, this worker speaks 2"):
        decode_frame(bytes(data))


def test_stubs_belong_to_the_proto_files() -> None:
    """`make proto` writes the stubs and the checksum."""
    names = (
        "control.proto",
        "enrolment.proto",
        "kv_disk.proto",
        "loading.proto",
        "microbatch.proto",
        "profile.proto",
        "sampling.proto",
    )
    text = b"".join((PROTO / name).read_bytes() for name in names)
    assert (PROTO / "protos.sha256").read_text().strip() == hashlib.sha256(text).hexdigest()
    assert {path.name for path in PROTO.glob("*.proto")} == set(names)


def test_every_field_of_a_proto_file_has_a_comment() -> None:
    for path in PROTO.glob("*.proto"):
        lines = path.read_text().splitlines()
        for before, text in itertools.pairwise(lines):
            if text.strip().endswith((";", "{")) and not text.startswith(("syntax", "package")):
                assert before.strip().startswith("//"), f"{path.name}: {text.strip()}"


def test_numbers_of_64_bits_arrive() -> None:
    decoded = decode_microbatch(encode_microbatch(Microbatch("m", 2**64 - 1, 2**64 - 1, (GOOD_CHUNK,))))
    assert (decoded.epoch, decoded.number) == (2**64 - 1, 2**64 - 1)


def test_what_rows_share_is_sent_once() -> None:
    params = SamplingParams(logit_bias=tuple((token, 1.0) for token in range(1024)))
    task = SampleTask(params, 1, 0, 5, history=tuple(range(1000)))
    one, many = (len(encode_inputs(SamplingInputs(1, 2, in_a_row(task, count)))) for count in (1, 32))
    assert many - one < 31 * 60


def test_what_is_kept_of_a_task_is_not_taken_for_another_one() -> None:
    task = SampleTask(SamplingParams(), 1, 0, 5)
    others = (
        replace(task, params=SamplingParams(temperature=1.0)),
        replace(task, seed=2),
        replace(task, choice=1),
        replace(task, position=6),
        replace(task, suppressed=(1,)),
        replace(task, top_logprobs=1),
        replace(task, history_rows=1),
        replace(task, penalty_window=0),
        replace(task, dry_window=0),
        replace(task, mu=2.0),
        replace(task, history=(1,)),
        replace(task, breakers=((1,),)),
    )
    inputs = SamplingInputs(1, 2, (task, *others, task))
    assert decode_inputs(encode_inputs(inputs)) == inputs

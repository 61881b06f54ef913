"""Frames that are read natively say what the codec says; those that are not are left to it."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llamaclust.core.errors import ProtocolError, WorkerError
from llamaclust.core.limits import MAX_BATCH_TOKENS, MAX_VOCABULARY
from llamaclust.kernels._native import MicrobatchFrame
from llamaclust.kernels._native import read_sampled_tokens as read_natively
from llamaclust.kernels.backend import Backend, Batch
from llamaclust.kernels.cpu.backend import CpuBackend
from llamaclust.kernels.reference.backend import ReferenceBackend
from llamaclust.model.loader import Model
from llamaclust.proto import microbatch_pb2
from llamaclust.wire.microbatch.codec import (
    decode_microbatch,
    decode_sampled_tokens,
    encode_microbatch,
    encode_sampled_tokens,
)
from llamaclust.wire.microbatch.frames import decode_frame, encode_failure, encode_hidden
from llamaclust.wire.microbatch.messages import Chunk, Microbatch, SampledTokens, StageTiming
from llamaclust.worker.stage.arrival import Arrival, frame_reader
from llamaclust.worker.stage.batches import build_batch
from llamaclust.worker.stage.sampled_tokens import SampledTokensBox
from llamaclust.worker.stage.stage_runner import StageRunner
from support.clusters.real_cluster import LIMITS as STAGE_LIMITS
from support.clusters.stage_chain import runner_of
from support.models.tiny_model import build_tiny_model
from support.wire.frame_reader import LIMITS, MODEL_ID, VOCABULARY, reader

WIDTH, UINT64 = 3, 2**64 - 1

uint64 = st.integers(0, UINT64)
timings = st.builds(StageTiming, uint64, uint64, uint64, st.integers(0, MAX_BATCH_TOKENS))
runs = st.tuples(st.integers(0, 41), st.integers(1, 7))
tables = st.lists(runs, min_size=1, max_size=3).map(lambda parts: tuple(chain.from_iterable(parts)))


@st.composite
def known(draw: st.DrawFn) -> Chunk:
    """Its window, if it has one, mostly ends with its last block."""
    ids = tuple(draw(st.lists(st.integers(0, VOCABULARY), min_size=1, max_size=5)))
    position, outputs = draw(st.integers(0, 95)), draw(st.integers(0, min(2, len(ids))))
    chunk = Chunk(ids, position, draw(tables), outputs)
    start, count = draw(st.integers(0, 6)), draw(st.integers(1, 3))
    fitting = -(-(position + len(ids)) // 16) - start
    if draw(st.integers(0, 3)) and 0 < fitting <= 6:
        count = fitting
    whole = (draw(st.integers(0, 3)), count)
    parts = whole if count == 1 or draw(st.booleans()) else (5, 1, whole[0], count - 1)
    return replace(chunk, window_table=parts, window_start=start) if draw(st.booleans()) else chunk


following = st.builds(
    Chunk, st.just((0,)), st.integers(0, 95), tables, st.integers(0, 1), st.tuples(st.integers(0, 6), st.integers(0, 3))
)
microbatches = st.builds(
    Microbatch,
    st.just(MODEL_ID),
    uint64,
    st.integers(7, UINT64),
    st.lists(known() | following, min_size=1, max_size=5).map(tuple),
)


def by_codec(data: bytes, hidden_width: int = 0, window: int | None = None) -> tuple[Microbatch, Batch]:
    """ProtocolError for what a stage refuses."""
    frame = decode_frame(data)
    microbatch = decode_microbatch(frame.header)
    frame.hidden(microbatch.rows, hidden_width)
    if microbatch.model_id != MODEL_ID:
        raise ProtocolError("another model")
    return microbatch, build_batch(microbatch, LIMITS, VOCABULARY, window)


def check_equal(native: MicrobatchFrame, microbatch: Microbatch, batch: Batch) -> None:
    plain = (batch.tokens, batch.positions, batch.sequence_starts, batch.table_starts, batch.block_tables)
    for array, expected in zip(native.arrays, (*plain, batch.output_rows, batch.window_tables), strict=True):
        assert (None if array is None else array.tolist()) == (None if expected is None else expected.tolist())
        assert array is None or array.dtype == np.int32
    assert (native.epoch, native.number, native.rows) == (microbatch.epoch, microbatch.number, microbatch.rows)
    assert native.depends_on == sorted({chunk.depends_on[0] for chunk in microbatch.chunks if chunk.depends_on})
    assert native.attended == sum(len(c.tokens) * (c.position + len(c.tokens)) for c in microbatch.chunks)


@settings(max_examples=400, deadline=None)
@given(microbatches, st.lists(timings, max_size=3).map(tuple), st.booleans(), st.sampled_from([0, 1, 16, 40]))
def test_a_frame_is_read_as_the_codec_reads_it_or_refused_by_both(
    microbatch: Microbatch, before: tuple[StageTiming, ...], is_first: bool, window: int
) -> None:
    width = 0 if is_first else WIDTH
    hidden = None if is_first else np.arange(microbatch.rows * WIDTH, dtype=np.float32).reshape(-1, WIDTH)
    data = encode_hidden(encode_microbatch(microbatch), before, hidden)
    native = reader(width, window).read(data)
    try:
        _, batch = by_codec(data, width, window or None)
    except ProtocolError:
        assert native is None
        return
    assert native is not None
    check_equal(native, microbatch, batch)
    assert [StageTiming(*timing) for timing in native.timings] == list(before)
    assert (None if native.hidden is None else native.hidden.tolist()) == (None if hidden is None else hidden.tolist())
    out, timing = np.full((microbatch.rows, 5), 0.5, np.float32), StageTiming(1, UINT64, 3, microbatch.rows)
    sent = native.next_frame(out, timing.queue_ns, timing.compute_ns, timing.wire_ns)
    assert sent == encode_hidden(encode_microbatch(microbatch), (*before, timing), out)


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A header of which some bytes are others, missing, or there twice."""
    data = bytearray(encode_microbatch(draw(microbatches)))
    for _ in range(draw(st.integers(1, 3))):
        start, end = sorted((draw(st.integers(0, len(data))), draw(st.integers(0, len(data)))))
        part = draw(st.sampled_from([b"", bytes(data[start:end]) * 2, b"\x00", b"\x80\x01", b"\xff" * 10]))
        other = draw(st.binary(min_size=1, max_size=2))
        data[start:end] = draw(st.sampled_from([part, other, bytes(data[start:end]) + other]))
    return bytes(data)


@settings(max_examples=1500, deadline=None)
@given(damaged() | st.binary(max_size=60), st.data())
def test_no_bytes_are_read_otherwise_than_by_the_codec(header: bytes, data: st.DataObject) -> None:
    frame = bytearray(encode_hidden(header, (), None))
    if data.draw(st.booleans()):
        frame[data.draw(st.integers(0, min(15, len(frame) - 1)))] ^= data.draw(st.integers(1, 255))
    native = reader().read(bytes(frame))
    if native is not None:
        check_equal(native, *by_codec(bytes(frame)))


GOOD = Chunk((1, 2), 14, (0, 1), 2)
UNUSUAL = {
    "embedded": replace(GOOD, embedded=(0, 1)),
    "adapters": replace(GOOD, adapters=((0, 1.0),)),
    "state": replace(GOOD, state_from=0),
    "states": replace(GOOD, state_to=(2, 0)),
    "next token": replace(GOOD, next_token=0),
    "drafts": replace(GOOD, drafts=1),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_what_is_not_usual_is_left_to_the_codec(name: str) -> None:
    usual, unusual = (Microbatch(MODEL_ID, 1, 0, (GOOD, chunk)) for chunk in (GOOD, UNUSUAL[name]))
    assert reader().read(encode_hidden(encode_microbatch(usual), (), None)) is not None
    assert reader().read(encode_hidden(encode_microbatch(unusual), (), None)) is None


def test_forms_that_mean_the_same_are_left_to_the_codec() -> None:
    header = encode_microbatch(Microbatch(MODEL_ID, 1, 0, (GOOD,)))
    twice = header + microbatch_pb2.Microbatch(epoch=1).SerializeToString()
    parted = microbatch_pb2.Microbatch(model_id=MODEL_ID, epoch=1).SerializeToString()
    chunk = (
        microbatch_pb2.Chunk(tokens=(1,)).SerializeToString()
        + microbatch_pb2.Chunk(tokens=(2,), position=14, table=(0, 1), outputs=2).SerializeToString()
    )
    parted += bytes((0x22, len(chunk))) + chunk
    for other in (twice, parted):
        assert decode_microbatch(other) == decode_microbatch(header)
        assert reader().read(encode_hidden(other, (), None)) is None
    assert reader().read(encode_failure(header, (), "no")) is None
    assert reader().read(encode_hidden(encode_microbatch(Microbatch("other", 1, 0, (GOOD,))), (), None)) is None


def test_tokens_that_were_not_known_come_to_their_places() -> None:
    chunks = (Chunk((0,), 4, (0, 1), 1, (5, 1)), Chunk((9,), 4, (1, 1), 1), Chunk((0,), 4, (2, 1), 1, (3, 0)))
    native = reader().read(encode_hidden(encode_microbatch(Microbatch(MODEL_ID, 1, 6, chunks)), (), None))
    assert native is not None
    assert native.depends_on == [3, 5]
    assert native.fill(5, (7, 8))
    assert native.fill(3, (6,))
    assert native.arrays[0].tolist() == [8, 9, 6]
    assert not native.fill(5, (7,))
    assert not native.fill(3, (VOCABULARY,))
    assert not native.fill(3, (-1,))


@settings(max_examples=400, deadline=None)
@example(0, [], b"\0", 0)  # the field 0, which no message has
@given(uint64, st.lists(st.integers(0, MAX_VOCABULARY), max_size=5), st.binary(max_size=2), st.integers(0, 20))
def test_sampled_tokens_are_read_as_the_codec_reads_them(number: int, ids: list[int], other: bytes, at: int) -> None:
    data = encode_sampled_tokens(SampledTokens(number, tuple(ids)))
    native = read_natively(data, MAX_BATCH_TOKENS, MAX_VOCABULARY)
    assert native == (None if MAX_VOCABULARY in ids else (number, ids))
    changed = data[:at] + other + data[at + len(other) :]
    if (native := read_natively(changed, MAX_BATCH_TOKENS, MAX_VOCABULARY)) is not None:
        assert SampledTokens(native[0], tuple(native[1])) == decode_sampled_tokens(changed)
    assert not ids or read_natively(data, len(ids) - 1, MAX_VOCABULARY) is None


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    path: Path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    return Model.open(build_tiny_model(path, hidden=64, layers=3, heads=4, ffn=96))


@pytest.mark.parametrize("backend", [ReferenceBackend(), CpuBackend(1)], ids=["reference", "cpu"])
def test_stages_compute_the_same_by_both_ways(model: Model, backend: Backend) -> None:
    runners = [StageRunner(backend, model, *layers, STAGE_LIMITS) for layers in pairwise((0, 1, 3))]
    tokens = SampledTokensBox()
    tokens.put(SampledTokens(4, (3, 5)))
    chunks = (Chunk((1, 2, 4), 0, (0, 2), 1), Chunk((0,), 0, (2, 1), 1, (4, 1)))
    frame = encode_hidden(encode_microbatch(Microbatch(model.model_id, 1, 5, chunks)), (), None)
    answers = []
    native = [frame_reader(runner) for runner in runners]
    assert None not in native
    for readers in (native, [None, None]):
        first = Arrival.read(frame, readers[0], 10, 20)
        assert (first.native is None) == (readers[0] is None)
        passed_on = first.next_frame(first.run(runners[0], tokens), StageTiming(1, 2, 3, first.rows))
        last = Arrival.read(passed_on, readers[1], 10, 20)
        assert (last.rows, last.attended, last.newest_dependency, last.embedded_rows) == (4, 10, 4, 0)
        assert (last.failure, last.timings) == (None, (StageTiming(1, 2, 3, 4),))
        logits = last.run(runners[1], tokens)
        assert isinstance(logits, np.ndarray)
        answers.append((passed_on, logits.tobytes()))
    assert answers[0] == answers[1]


def test_a_token_that_is_missing_is_an_error_by_both_ways(model: Model) -> None:
    runner, chunk = runner_of(model, 0, 1), Chunk((0,), 4, (0, 2), 1, (0, 0))
    frame = encode_hidden(encode_microbatch(Microbatch(model.model_id, 1, 1, (chunk,))), (), None)
    for way in (frame_reader(runner), None):
        with pytest.raises(WorkerError, match="row 0 of microbatch 0 has no token to follow: 0 are known"):
            Arrival.read(frame, way, 0, 0).run(runner, SampledTokensBox())

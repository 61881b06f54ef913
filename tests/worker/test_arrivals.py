"""Tests that the native and the plain reader of frames give equal results and reject the same frames."""

from __future__ import annotations

import contextlib
from dataclasses import astuple, replace
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamaclust.core.errors import ProtocolError, WorkerError
from llamaclust.core.limits import MAX_BATCH_TOKENS
from llamaclust.core.sampler.bounds import MAX_VOCABULARY
from llamaclust.kernels._native import MicrobatchFrame
from llamaclust.kernels._native import read_sampled_tokens as read_natively
from llamaclust.kernels.backend import Backend, Batch
from llamaclust.kernels.cpu.backend import CpuBackend
from llamaclust.kernels.reference.backend import ReferenceBackend
from llamaclust.model.loader import Model
from llamaclust.wire.microbatch.codec import encode_microbatch, encode_sampled_tokens
from llamaclust.wire.microbatch.frames import encode_hidden
from llamaclust.wire.microbatch.messages import Chunk, ImageRows, Microbatch, SampledTokens, StageTiming
from llamaclust.worker.stage.arrival import Arrival
from llamaclust.worker.stage.dependencies import SampledTokensBox
from llamaclust.worker.stage.stage_runner import StageRunner, batch_of
from support.clusters.real_cluster import LIMITS as STAGE_LIMITS
from support.clusters.stage_chain import runner_of
from support.models.tiny_model import build_tiny_model
from support.wire.batches import plain_batch
from support.wire.frame_reader import ADAPTERS, GIVEN_WIDTH, LIMITS, MODEL_ID, SECTIONS, VOCABULARY, reader
from support.wire.plain_tokens import PlainTokensBox
from support.wire.slow_codec import decode_sampled_tokens, encode_frame, plain_frame, plain_microbatch

WIDTH, UINT64, STATES = 3, 2**64 - 1, 30
STATEFUL = replace(LIMITS, state_blocks=STATES)

uint64 = st.integers(0, UINT64)
timings = st.builds(StageTiming, uint64, uint64, uint64, st.integers(0, MAX_BATCH_TOKENS))
runs = st.tuples(st.integers(0, 41), st.integers(1, 7))
tables = st.lists(runs, min_size=1, max_size=3).map(lambda parts: tuple(chain.from_iterable(parts)))


@st.composite
def known(draw: st.DrawFn) -> Chunk:
    """Draws a chunk whose window, if any, usually ends with its last block."""
    ids = tuple(draw(st.lists(st.integers(0, VOCABULARY), min_size=1, max_size=5)))
    position, outputs = draw(st.integers(0, 95)), draw(st.integers(0, min(2, len(ids))))
    chunk = Chunk(ids, position, draw(tables), outputs)
    start, count = draw(st.integers(0, 6)), draw(st.integers(1, 3))
    fitting = -(-(position + len(ids)) // 16) - start
    if draw(st.integers(0, 3)) and 0 < fitting <= 6:
        count = fitting
    whole = (draw(st.integers(0, 3)), count)
    parts = whole if count == 1 or draw(st.booleans()) else (5, 1, whole[0], count - 1)
    chunk = replace(chunk, window_table=parts, window_start=start) if draw(st.booleans()) else chunk
    if draw(st.booleans()):
        return chunk
    end = draw(st.integers(0, len(ids)))
    return replace(
        chunk,
        embedded=(draw(st.integers(0, end)), end) if end else (0, 0),
        adapters=draw(st.sampled_from([(), ((0, 1.5),), ((1, -0.5), (2, 3.0)), ((2, 1.0), (3, 1.0))])),
        next_token=draw(st.none() | st.integers(0, VOCABULARY)),
        drafts=draw(st.integers(0, 3)),
        checked=draw(st.booleans()),
        images=draw(st.none() | images(len(ids))),
    )


@st.composite
def images(draw: st.DrawFn, rows: int) -> ImageRows:
    """Draws image rows, usually with as many numbers as the rows need."""
    places = st.lists(st.integers(0, rows + 1), max_size=4).map(sorted)
    given, groups = ([*zip(ends[::2], ends[1::2], strict=False)] for ends in (draw(places), draw(places)))
    count = sum(end - first for first, end in given)
    values = draw(st.lists(st.floats(width=32, allow_nan=False), min_size=(few := count * GIVEN_WIDTH), max_size=few))
    wrong = draw(st.integers(0, 9)) == 0
    turned = rows * SECTIONS * draw(st.integers(0, 1)) + wrong
    positions = draw(st.lists(st.integers(-wrong, LIMITS.max_context_tokens - 1), min_size=turned, max_size=turned))
    return ImageRows(
        tuple(given), np.array(values, "<f4").tobytes(), tuple(groups), np.array(positions, "<i4").tobytes()
    )


@st.composite
def stateful(draw: st.DrawFn) -> Chunk:
    """Draws a chunk, usually with the states that it needs."""
    chunk = draw(known())
    count, block = len(chunk.tokens), st.integers(0, STATES)
    early = (draw(st.integers(1, count - 1)), draw(block)) if count > 1 and draw(st.booleans()) else ()
    first = draw(block) if chunk.position and draw(st.integers(0, 9)) else None
    return replace(chunk, state_from=first, state_to=(*early, count, draw(block)))


following = st.builds(
    Chunk, st.just((0,)), st.integers(0, 95), tables, st.integers(0, 1), st.tuples(st.integers(0, 6), st.integers(0, 3))
)
microbatches = st.builds(
    Microbatch,
    st.just(MODEL_ID),
    uint64,
    st.integers(7, UINT64),
    (st.lists(stateful(), min_size=1, max_size=5) | st.lists(known() | following, min_size=1, max_size=5)).map(tuple),
)


def by_plain_reader(data: bytes, hidden_width: int = 0, window: int | None = None) -> tuple[Microbatch, Batch]:
    """Reads a frame; raises ProtocolError if a stage rejects it."""
    frame = plain_frame(data)
    microbatch = plain_microbatch(frame.header)
    if len(frame.body) != microbatch.rows * hidden_width * 4 or microbatch.model_id != MODEL_ID:
        raise ProtocolError("another hidden state or model")
    return microbatch, plain_batch(microbatch, STATEFUL, VOCABULARY, window, ADAPTERS, (GIVEN_WIDTH, SECTIONS))


def flat(batch: Batch) -> list[object]:
    parts = [part for part in (batch.states, batch.given) if part is not None]
    arrays = [*astuple(replace(batch, states=None, given=None)), *chain.from_iterable(map(astuple, parts))]
    return [None if array is None else (array.dtype, array.tolist()) for array in arrays]


def check_equal(native: MicrobatchFrame, microbatch: Microbatch, batch: Batch) -> None:
    assert flat(batch_of(native)) == flat(batch)
    chunks, starts = microbatch.chunks, batch.sequence_starts
    assert (native.epoch, native.number, native.rows) == (microbatch.epoch, microbatch.number, microbatch.rows)
    assert native.dependencies == [chunk.depends_on for chunk in chunks if chunk.depends_on]
    assert native.attended == sum(len(c.tokens) * (c.position + len(c.tokens)) for c in chunks)
    assert native.checked_chunks == [index for index, chunk in enumerate(chunks) if chunk.checked]
    drafts = [(index, -1 if c.next_token is None else c.next_token, c.drafts) for index, c in enumerate(chunks)]
    assert native.draft_orders == [order for order in drafts if order[1:] != (-1, 0)]
    embedded = [range(start + c.embedded[0], start + c.embedded[1]) for start, c in zip(starts, chunks, strict=False)]
    assert native.embedded_rows.tolist() == [*chain.from_iterable(embedded)]


@settings(max_examples=400, deadline=None)
@given(microbatches, st.lists(timings, max_size=3).map(tuple), st.booleans(), st.sampled_from([0, 1, 16, 40]))
def test_a_frame_is_read_as_the_plain_reader_reads_it_or_refused_by_both(
    microbatch: Microbatch, before: tuple[StageTiming, ...], is_first: bool, window: int
) -> None:
    width = 0 if is_first else WIDTH
    hidden = None if is_first else np.arange(microbatch.rows * WIDTH, dtype=np.float32).reshape(-1, WIDTH)
    header = encode_microbatch(microbatch)
    data = encode_frame(header, before, hidden)
    assert before or data == encode_hidden(header, hidden)
    try:
        _, batch = by_plain_reader(data, width, window or None)
        if not all(timing.rows >= 1 for timing in before):
            raise ProtocolError("rows of a timing")
    except ProtocolError:
        with pytest.raises(ProtocolError):
            reader(width, window, STATES).read(data)
        return
    native = reader(width, window, STATES).read(data)
    check_equal(native, microbatch, batch)
    assert (None if native.hidden is None else native.hidden.tolist()) == (None if hidden is None else hidden.tolist())
    out, timing = np.full((microbatch.rows, 5), 0.5, np.float32), StageTiming(1, UINT64, 3, microbatch.rows)
    sent = native.next_frame(out, timing.queue_ns, timing.compute_ns, timing.wire_ns)
    assert sent == encode_frame(header, (*before, timing), out)
    assert native.failure_frame("no") == encode_frame(header, before, failure="no")


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """Draws a header with some bytes changed, missing or repeated."""
    data = bytearray(encode_microbatch(draw(microbatches)))
    for _ in range(draw(st.integers(1, 3))):
        start, end = sorted((draw(st.integers(0, len(data))), draw(st.integers(0, len(data)))))
        part = draw(st.sampled_from([b"", bytes(data[start:end]) * 2, b"\x00", b"\x80\x01", b"\xff" * 10]))
        other = draw(st.binary(min_size=1, max_size=2))
        data[start:end] = draw(st.sampled_from([part, other, bytes(data[start:end]) + other]))
    return bytes(data)


@settings(max_examples=1500, deadline=None)
@given(damaged() | st.binary(max_size=60), st.data())
def test_damaged_bytes_are_read_as_the_plain_reader_reads_them_or_refused(header: bytes, data: st.DataObject) -> None:
    frame = bytearray(encode_hidden(header))
    if data.draw(st.booleans()):
        frame[data.draw(st.integers(0, min(15, len(frame) - 1)))] ^= data.draw(st.integers(1, 255))
    try:
        native = reader(state_blocks=STATES).read(bytes(frame))
    except ProtocolError:
        return
    if native.failure is None:
        check_equal(native, *by_plain_reader(bytes(frame)))


def test_a_failure_is_read_with_its_microbatch() -> None:
    header = encode_microbatch(Microbatch(MODEL_ID, 1, 0, (Chunk((1, 2), 14, (0, 1), 2),)))
    native = reader(WIDTH).read(encode_frame(header, (), failure="worker b: out of memory"))
    assert (native.failure, native.number, native.hidden) == ("worker b: out of memory", 0, None)
    with pytest.raises(ProtocolError, match="microbatch of model cd34, this stage holds ab12"):
        reader().read(encode_hidden(header.replace(MODEL_ID.encode(), b"cd34")))


def test_tokens_that_were_not_known_come_to_their_places() -> None:
    chunks = (Chunk((0,), 4, (0, 1), 1, (5, 1)), Chunk((9,), 4, (1, 1), 1), Chunk((0,), 4, (2, 1), 1, (3, 0)))
    native = reader().read(encode_hidden(encode_microbatch(Microbatch(MODEL_ID, 1, 6, chunks))))
    assert native.depends_on == [3, 5]
    assert native.fill(5, (7, 8))
    assert native.fill(3, (6,))
    assert native.arrays[0].tolist() == [8, 9, 6]
    assert not native.fill(5, (7,))
    for token in (VOCABULARY, -1):
        with pytest.raises(ProtocolError, match=f"token {token} is not in the vocabulary"):
            native.fill(3, (token,))


@settings(max_examples=400, deadline=None)
@given(uint64, st.lists(st.integers(0, MAX_VOCABULARY), max_size=5), st.binary(max_size=2), st.integers(0, 20))
def test_sampled_tokens_are_read_as_the_plain_reader_reads_them(
    number: int, ids: list[int], other: bytes, at: int
) -> None:
    data = encode_sampled_tokens(SampledTokens(number, tuple(ids)))
    with pytest.raises(ProtocolError) if MAX_VOCABULARY in ids else contextlib.nullcontext():
        assert decode_sampled_tokens(data) == SampledTokens(number, tuple(ids))
    with contextlib.suppress(ProtocolError):
        decode_sampled_tokens(data[:at] + other + data[at + len(other) :])
    if ids:
        with pytest.raises(ProtocolError):
            read_natively(data, len(ids) - 1, MAX_VOCABULARY)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    path: Path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    return Model.open(build_tiny_model(path, hidden=64, layers=3, heads=4, ffn=96))


@pytest.mark.parametrize("backend", [ReferenceBackend(), CpuBackend(1)], ids=["reference", "cpu"])
def test_stages_compute_frames_as_they_compute_batches(model: Model, backend: Backend) -> None:
    runners = [StageRunner(backend, model, *layers, STAGE_LIMITS) for layers in pairwise((0, 1, 3))]
    tokens = PlainTokensBox()
    tokens.put(SampledTokens(4, (3, 5)))
    chunks = (Chunk((1, 2, 4), 0, (0, 2), 1), Chunk((0,), 0, (2, 1), 1, (4, 1)))
    microbatch = Microbatch(model.model_id, 1, 5, chunks)
    first = Arrival.read(encode_hidden(encode_microbatch(microbatch)), runners[0].reader, 10, 20)
    tokens.fill(first.frame)
    hidden = runners[0].run_frame(first.frame)
    passed_on = first.next_frame(hidden, StageTiming(1, 2, 3, first.frame.rows))
    last = Arrival.read(passed_on, runners[1].reader, 10, 20)
    assert (last.frame.rows, last.frame.attended, last.newest_dependency, last.failure) == (4, 10, 4, None)
    logits = runners[1].run_frame(last.frame)
    assert isinstance(logits, np.ndarray)
    filled, found = tokens.filled(microbatch), logits.tobytes()
    assert runners[1].run(filled, runners[0].run(filled, None)).tobytes() == found


def test_a_token_that_is_missing_is_an_error(model: Model) -> None:
    runner, chunk = runner_of(model, 0, 1), Chunk((0,), 4, (0, 2), 1, (0, 0))
    frame = encode_hidden(encode_microbatch(Microbatch(model.model_id, 1, 1, (chunk,))))
    with pytest.raises(WorkerError, match="microbatch 0 sampled no token for row 0: it sampled 0 tokens"):
        SampledTokensBox().fill(Arrival.read(frame, runner.reader, 0, 0).frame)


def test_a_failure_is_read_as_one_safe_line(model: Model) -> None:
    header = encode_microbatch(Microbatch(model.model_id, 1, 1, (Chunk((1,), 4, (0, 2), 1),)))
    frame = encode_frame(header, (), failure="worker b:\nout of \x1b[31mmemory")
    assert Arrival.read(frame, runner_of(model, 1, 2).reader, 0, 0).failure == "worker b: out of [31mmemory"

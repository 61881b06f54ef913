"""Plain Python codecs of the messages of each microbatch, for comparison with native code."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llamaclust.core.bounds import one_line
from llamaclust.core.errors import ProtocolError
from llamaclust.core.limits import MAX_KV_BLOCKS
from llamaclust.core.sampler.fields import numbers_of
from llamaclust.core.sampler.params import CHAIN, PARAMS, SAMPLERS, SamplerChain, SamplingParams
from llamaclust.core.sampler.tasks import MatcherRow, RowTask, SampleTask, ScoreTask
from llamaclust.proto import microbatch_pb2, sampling_pb2
from llamaclust.wire.codec import parse
from llamaclust.wire.microbatch.codec import MAX_INPUTS_BYTES, MAX_MICROBATCH_BYTES
from llamaclust.wire.microbatch.matchers import starts_in
from llamaclust.wire.microbatch.messages import (
    Chunk,
    ImageRows,
    Microbatch,
    Result,
    SampledTokens,
    SamplingInputs,
    StageTiming,
)
from llamaclust.worker.stage.dependencies import read_sampled_tokens
from llamaclust.worker.stage.step_inputs import StepInputs
from support.wire.frame_reader import GIVEN_WIDTH, SECTIONS, wire_reader

PREFIX = struct.Struct("<4sBBHII")
TASK = np.dtype(
    [("params", "<i4"), ("token", "<i4"), ("seed", "<u8")]
    + [(name, "<u4") for name in ("choice", "position", "top_logprobs", "history_rows")]
    + [("penalty_window", "<i4"), ("dry_window", "<i4")]
    + [(name, "<u4") for name in ("history", "history_tokens", "suppressed", "suppressed_tokens")]
)
CHAINED = np.dtype([("mu", "<f8"), ("row", "<u4"), ("first", "<u4"), ("count", "<u4"), ("zero", "<u4")])
ADAPTER = np.dtype([("chunk", "<i4"), ("number", "<i4"), ("scale", "<f4")])


@dataclass(frozen=True)
class Frame:
    """A frame's parts; `body` is a hidden state or a failure."""

    kind: int
    header: bytes
    timings: tuple[StageTiming, ...]
    body: bytes

    def hidden(self, rows: int, width: int) -> NDArray[np.float32]:
        return np.frombuffer(self.body, "<f4").reshape(rows, width)

    @property
    def failure(self) -> str:
        return self.body.decode("utf-8", "replace")


def decode_frame(data: bytes) -> Frame:
    """Returns the parts of a frame that the native reader accepts; raises that reader's ProtocolError."""
    try:
        frame = plain_frame(data)
        microbatch = plain_microbatch(frame.header)
    except Exception as error:
        wire_reader("m").read(data)
        raise AssertionError("the native reader accepts what the plain one refuses") from error
    width = 0 if frame.kind == 2 else len(frame.body) // (4 * max(1, microbatch.rows))
    wire_reader(microbatch.model_id, width).read(data)
    return frame


def plain_frame(data: bytes) -> Frame:
    """Decodes a valid frame."""
    _, _, kind, stages, header_bytes, body_bytes = PREFIX.unpack_from(data)
    body = PREFIX.size + 32 * stages
    timings = np.frombuffer(data[PREFIX.size : body], "<u8").reshape(-1, 4).tolist()
    assert len(data) == body + body_bytes + header_bytes
    return Frame(
        kind,
        data[body + body_bytes :],
        tuple(StageTiming(*timing) for timing in timings),
        data[body : body + body_bytes],
    )


def encode_frame(
    header: bytes, timings: Sequence[StageTiming] = (), hidden: NDArray[np.float32] | None = None, failure: str = ""
) -> bytes:
    """Encodes a frame as a stage sends it."""
    body = failure.encode() if hidden is None else np.ascontiguousarray(hidden, "<f4").tobytes()
    packed = [struct.pack("<4Q", t.queue_ns, t.compute_ns, t.wire_ns, t.rows) for t in timings]
    prefix = PREFIX.pack(b"LCST", 2, 2 if failure else 1, len(timings), len(header), len(body))
    return b"".join((prefix, *packed, body, header))


def decode_microbatch(data: bytes) -> Microbatch:
    """Decodes with both readers, which must agree; raises the native reader's ProtocolError."""
    message = parse(microbatch_pb2.Microbatch, data, MAX_MICROBATCH_BYTES)
    state_blocks = MAX_KV_BLOCKS if message.states else 0
    native = wire_reader(message.model_id, state_blocks=state_blocks).read(encode_frame(data, failure="none"))
    plain = plain_microbatch(data)
    assert (native.epoch, native.number, native.rows) == (plain.epoch, plain.number, plain.rows)
    return plain


def plain_microbatch(data: bytes) -> Microbatch:
    """Decodes bytes whose arrays have matching lengths."""
    message = parse(microbatch_pb2.Microbatch, data, MAX_MICROBATCH_BYTES)
    chunks = _ints(message.chunks, 5)
    tokens, tables = _ints(message.tokens, 1).ravel().tolist(), _ints(message.tables, 2)
    followed = {int(chunk): (int(number), int(row)) for chunk, number, row in _words(message.followed, 3)}
    windows, window_tables = _ints(message.windows, 2), _ints(message.window_tables, 2)
    embedded = {chunk: (first, end) for chunk, first, end in _ints(message.embedded, 3).tolist()}
    adapters = np.frombuffer(message.adapters, ADAPTER).tolist()
    before, states = _ints(message.states_before, 1).ravel().tolist(), _ints(message.states, 3).tolist()
    drafts = {chunk: (token, count) for chunk, token, count in _ints(message.drafts, 3).tolist()}
    images = _images(message.images, chunks[:, 0].tolist())
    found = []
    for index, (count, position, outputs, runs, checked) in enumerate(chunks.tolist()):
        own, tokens = tokens[:count], tokens[count:]
        table, tables = tables[:runs], tables[runs:]
        start, window_runs = windows[index].tolist() if len(windows) else (0, 0)
        window, window_tables = window_tables[:window_runs], window_tables[window_runs:]
        next_token, drafted = drafts.get(index, (-1, 0))
        found.append(
            Chunk(
                tuple(own),
                position,
                tuple(table.ravel().tolist()),
                outputs,
                followed.get(index),
                tuple(window.ravel().tolist()),
                start,
                embedded.get(index, (0, 0)),
                tuple((number, scale) for chunk, number, scale in adapters if chunk == index),
                None if not before or before[index] < 0 else before[index],
                tuple(number for chunk, *state in states if chunk == index for number in state),
                None if next_token < 0 else next_token,
                drafted,
                bool(checked),
                images.get(index),
            )
        )
    return Microbatch(message.model_id, message.epoch, message.number, tuple(found))


def _images(message: microbatch_pb2.ImageRows, rows: list[int]) -> dict[int, ImageRows]:
    """Returns image rows by chunk; `rows` are the chunks' lengths."""
    given, groups = _ints(message.given, 3).tolist(), _ints(message.groups, 3).tolist()
    values, positions = _array(message.values, "<f4", GIVEN_WIDTH), _ints(message.rope_positions, SECTIONS)
    turned = _ints(message.rope_chunks, 1).ravel().tolist()
    found = {}
    for place in sorted({*turned, *(chunk for chunk, *_ in (*given, *groups))}):
        ranges = tuple((first, end) for chunk, first, end in given if chunk == place)
        count, moved = sum(end - first for first, end in ranges), rows[place] if place in turned else 0
        found[place] = ImageRows(
            ranges,
            values[:count].tobytes(),
            tuple((first, end) for chunk, first, end in groups if chunk == place),
            positions[:moved].tobytes(),
        )
        values, positions = values[count:], positions[moved:]
    if len(values) or len(positions):
        raise ProtocolError("values of no row")
    return found


def decode_sampled_tokens(data: bytes) -> SampledTokens:
    """Decodes with both readers, which must agree; raises the native reader's ProtocolError."""
    native = read_sampled_tokens(data)
    message = parse(microbatch_pb2.SampledTokens, data, MAX_MICROBATCH_BYTES)
    plain = SampledTokens(message.number, tuple(_ints(message.tokens, 1).ravel().tolist()))
    assert native == plain
    return plain


def decode_inputs(data: bytes) -> SamplingInputs:
    """Decodes with both readers, which must agree; raises the native reader's ProtocolError."""
    native, plain = StepInputs.read(data), plain_inputs(data)
    rows = [(place, task.matcher) for place, task in enumerate(plain.tasks) if isinstance(task, SampleTask)]
    matched = [(place, row.key, row.position, row.drafted) for place, row in rows if row is not None]
    tasks = native.tasks
    assert (tasks.epoch, tasks.number, tasks.rows) == (plain.epoch, plain.number, len(plain.tasks))
    assert (tasks.matcher_rows, tuple(tasks.released), native.starts) == (matched, plain.released, plain.starts)
    assert native.tasks.scored == [isinstance(task, ScoreTask) for task in plain.tasks]
    return plain


def plain_inputs(data: bytes) -> SamplingInputs:
    """Decodes bytes whose arrays have matching lengths."""
    message = parse(sampling_pb2.SamplingInputs, data, MAX_INPUTS_BYTES)
    params = [_params_in(sampling_pb2.SamplingParams.FromString(each)) for each in message.params]
    tokens, breakers = _ints(message.tokens, 1).ravel().tolist(), _ints(message.breakers, 2).tolist()
    chained = {int(row["row"]): row for row in np.frombuffer(message.chained, CHAINED)}
    matchers = {int(row): MatcherRow(int(key), int(position)) for row, key, position in _words(message.matcher_rows, 3)}
    tasks: list[RowTask] = []
    for row, record in enumerate(np.frombuffer(message.tasks, TASK)):
        task = {name: int(record[name]) for name in TASK.names or ()}
        if task["params"] < 0:
            tasks.append(ScoreTask(task["token"], task["top_logprobs"]))
            continue
        more = chained.get(row)
        spans = breakers[int(more["first"]) :][: int(more["count"])] if more is not None else []
        tasks.append(
            SampleTask(
                params[task["params"]],
                task["seed"],
                task["choice"],
                task["position"],
                tuple(tokens[task["history"] :][: task["history_tokens"]]),
                tuple(tokens[task["suppressed"] :][: task["suppressed_tokens"]]),
                task["top_logprobs"],
                task["history_rows"],
                None if task["penalty_window"] < 0 else task["penalty_window"],
                None if task["dry_window"] < 0 else task["dry_window"],
                tuple(tuple(tokens[first : first + count]) for first, count in spans),
                0.0 if more is None else float(more["mu"]),
                matchers.get(row),
            )
        )
    starts = starts_in(message.starts.SerializeToString()) if message.HasField("starts") else ()
    return SamplingInputs(
        message.epoch, message.number, tuple(tasks), tuple(np.frombuffer(message.released, "<u8").tolist()), starts
    )


def _params_in(message: sampling_pb2.SamplingParams) -> SamplingParams:
    biases = zip(
        _ints(message.logit_bias_tokens, 1).ravel().tolist(),
        np.frombuffer(message.logit_biases, "<f4").tolist(),
        strict=True,
    )
    chain = None
    if message.HasField("chain"):
        order = tuple(SAMPLERS[number] for number in _ints(message.chain.order, 1).ravel())
        unpenalized = tuple(_ints(message.chain.unpenalized, 1).ravel().tolist())
        chain = SamplerChain(order, unpenalized=unpenalized, **numbers_of(message.chain, CHAIN))
    return SamplingParams(logit_bias=tuple(biases), chain=chain, **numbers_of(message, PARAMS))


def encode_result(result: Result) -> bytes:
    """Encodes a result as a last stage writes it."""
    rows = [*enumerate(result.rows)]
    message = sampling_pb2.Result(
        epoch=result.epoch,
        number=result.number,
        tokens=np.array([row.token for _, row in rows], "<i4").tobytes(),
        logprobs=np.array([0 if row.token < 0 else row.logprob for _, row in rows], "<f4").tobytes(),
        timings=b"".join(struct.pack("<4Q", t.queue_ns, t.compute_ns, t.wire_ns, t.rows) for t in result.timings),
        failure=None if result.failure is None else one_line(result.failure),
        embeddings=result.embeddings,
        drafting_ns=result.drafting_ns,
        matcher_ns=b"".join(struct.pack("<2Q", place, row.matcher_ns) for place, row in rows if row.matcher_ns),
        deferred=np.array([place for place, row in rows if row.is_deferred], "<i4").tobytes(),
    )
    if any(row.top_logprobs for _, row in rows):
        message.top_counts = np.array([len(row.top_logprobs) for _, row in rows], "<i4").tobytes()
        message.top_logprobs = b"".join(struct.pack("<if", *pair) for _, row in rows for pair in row.top_logprobs)
    if any(row.mu is not None for _, row in rows):
        message.mus = np.array([math.nan if row.mu is None else row.mu for _, row in rows], "<f8").tobytes()
    for place, row in rows:
        following = row.forced, row.forced_draft, row.drafted
        if any(following):
            message.following += struct.pack("<4i", place, *map(len, following))
            message.following_tokens += b"".join(struct.pack("<i", token) for tokens in following for token in tokens)
        if row.failure is not None:
            message.failures.add(row=place, text=one_line(row.failure), is_request_fault=row.is_request_fault)
    return message.SerializeToString()


def _ints(data: bytes, columns: int) -> NDArray[np.int32]:
    return _array(data, "<i4", columns)


def _words(data: bytes, columns: int) -> NDArray[np.uint64]:
    return _array(data, "<u8", columns)


def _array(data: bytes, kind: str, columns: int) -> NDArray[Any]:
    if len(data) % (columns * np.dtype(kind).itemsize):
        raise ProtocolError("a broken record")
    return np.frombuffer(data, kind).reshape(-1, columns)

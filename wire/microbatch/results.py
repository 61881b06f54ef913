"""Decodes and checks results for the coordinator. The last stage encodes them natively (kernels/cpu/native/frames)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from struct import Struct
from typing import Any

from llamaclust.core import limits
from llamaclust.core.bounds import MAX_ONE_LINE, bounded, finite, line
from llamaclust.core.errors import ProtocolError
from llamaclust.core.sampler.bounds import (
    MAX_DRAFTED_TOKENS,
    MAX_FORCED_TOKENS,
    MAX_MATCHER_NS,
    MAX_MU,
    MAX_VOCABULARY,
)
from llamaclust.core.sampler.results import RowResult, TopLogprobs
from llamaclust.proto import sampling_pb2 as sampling_proto
from llamaclust.wire.codec import parse
from llamaclust.wire.microbatch.codec import MAX_INPUTS_BYTES, MAX_STAGES
from llamaclust.wire.microbatch.messages import Result, StageTiming

_INT, _FLOAT, _DOUBLE = Struct("<i"), Struct("<f"), Struct("<d")
_TIMING, _TOP, _FOLLOWING, _MATCHER_NS = Struct("<4Q"), Struct("<if"), Struct("<4i"), Struct("<2Q")
_FOLLOWING_BOUNDS = (
    ("forced", MAX_FORCED_TOKENS),
    ("forced_draft", MAX_FORCED_TOKENS),
    ("drafted", MAX_DRAFTED_TOKENS),
)

_ROW_BYTES = 4 * (2 * MAX_FORCED_TOKENS + MAX_DRAFTED_TOKENS) + 4 * MAX_ONE_LINE + 128


def most_result_bytes(rows: int, top_logprobs: int, *, embeds: bool) -> int:
    """Returns the maximum size in bytes of a result with `rows` rows and, in total, `top_logprobs` top logprobs."""
    embedded = limits.MAX_EMBEDDING_BYTES if embeds else 0
    return (rows + 1) * _ROW_BYTES + top_logprobs * _TOP.size + MAX_STAGES * _TIMING.size + embedded


def decode_result(data: bytes) -> Result:
    message = parse(sampling_proto.Result, data, MAX_INPUTS_BYTES)
    records = _records("timings", message.timings, _TIMING, most=MAX_STAGES)
    timings = tuple(StageTiming(*numbers) for numbers in records)
    for timing in timings:
        bounded("rows of a timing", timing.rows, 1, limits.MAX_BATCH_TOKENS)
    _records("embeddings", message.embeddings, _FLOAT, most=limits.MAX_EMBEDDING_BYTES // _FLOAT.size)
    return Result(
        message.epoch,
        message.number,
        tuple(_rows(message)),
        timings,
        line("failure", message.failure) if message.HasField("failure") else None,
        message.embeddings,
        message.drafting_ns,
    )


def _rows(message: sampling_proto.Result) -> list[RowResult]:
    tokens = _numbers("tokens", message.tokens, _INT)
    logprobs = _numbers("logprobs", message.logprobs, _FLOAT)
    bounded("rows", len(tokens), 0, limits.MAX_BATCH_TOKENS)
    bounded("logprobs", len(logprobs), len(tokens), len(tokens))
    _check_tokens(tokens, -1)
    _check_finite(logprobs)
    if message.top_counts:
        rows = list(map(RowResult, tokens, logprobs, _tops(message, len(tokens))))
    else:
        rows = list(map(RowResult, tokens, logprobs))
    if min(tokens, default=0) < 0:
        _add_unanswered(message, rows)
    if message.mus:
        mus = _numbers("mus", message.mus, _DOUBLE)
        bounded("mus", len(mus), len(rows), len(rows))
        _change(rows, {row: {"mu": finite("mu", mu, -MAX_MU, MAX_MU)} for row, mu in enumerate(mus) if mu == mu})
    if message.following or message.following_tokens:
        _change(rows, _following(message))
    taken = dict(_records("matcher_ns", message.matcher_ns, _MATCHER_NS, most=len(rows)))
    _change(rows, {row: {"matcher_ns": bounded("matcher_ns", ns, 0, MAX_MATCHER_NS)} for row, ns in taken.items()})
    return rows


def _tops(message: sampling_proto.Result, rows: int) -> list[Sequence[tuple[int, float]]]:
    pairs, counts = message.top_logprobs, _numbers("top_counts", message.top_counts, _INT)
    bounded("top_counts", len(counts), rows, rows)
    bounded("top_logprobs", min(counts), 0, limits.MAX_TOP_LOGPROBS)
    bounded("top_logprobs", max(counts), 0, limits.MAX_TOP_LOGPROBS)
    bounded("bytes of top_logprobs", len(pairs), _TOP.size * sum(counts), _TOP.size * sum(counts))
    _check_tokens(memoryview(pairs).cast("i")[::2].tolist(), 0)
    _check_finite(memoryview(pairs).cast("f")[1::2].tolist())
    tops: list[Sequence[tuple[int, float]]] = []
    at = 0
    for count in counts:
        tops.append(TopLogprobs(pairs[at : at + _TOP.size * count]) if count else ())
        at += _TOP.size * count
    return tops


def _add_unanswered(message: sampling_proto.Result, rows: list[RowResult]) -> None:
    changes: dict[int, dict[str, Any]] = {}
    deferred = _numbers("deferred", message.deferred, _INT)
    bounded("rows that fail or are deferred", len(deferred) + len(message.failures), 0, len(rows))
    for row in deferred:
        changes[row] = {"is_deferred": True}
    for failed in message.failures:
        changes[failed.row] = {"failure": line("failure", failed.text), "is_request_fault": failed.is_request_fault}
    for row, fields in changes.items():
        fields["logprob"] = math.nan
        if not 0 <= row < len(rows) or rows[row].token >= 0:
            raise ProtocolError(f"row {row} of {len(rows)} fails or is deferred, but it has an answer")
    if unknown := [row for row, result in enumerate(rows) if result.token < 0 and row not in changes]:
        raise ProtocolError(f"row {unknown[0]} has no answer, and the result does not say why")
    _change(rows, changes)


def _following(message: sampling_proto.Result) -> dict[int, dict[str, Any]]:
    tokens, at = _numbers("following tokens", message.following_tokens, _INT), 0
    _check_tokens(tokens, 0)
    changes: dict[int, dict[str, Any]] = {}
    for row, *counts in _records("following", message.following, _FOLLOWING, most=limits.MAX_BATCH_TOKENS):
        changes[row] = {}
        for (name, most), count in zip(_FOLLOWING_BOUNDS, counts, strict=True):
            bounded(f"{name} tokens", count, 0, min(most, len(tokens) - at))
            changes[row][name] = tuple(tokens[at : at + count])
            at += count
    bounded("following tokens", len(tokens), at, at)
    return changes


def _change(rows: list[RowResult], changes: dict[int, dict[str, Any]]) -> None:
    for row, fields in changes.items():
        bounded("row", row, 0, len(rows) - 1)
        rows[row] = replace(rows[row], **fields)


def _check_tokens(tokens: Sequence[int], least: int) -> None:
    if tokens:
        bounded("token", min(tokens), least, MAX_VOCABULARY - 1)
        bounded("token", max(tokens), least, MAX_VOCABULARY - 1)


def _check_finite(logprobs: Sequence[float]) -> None:
    if not all(map(math.isfinite, logprobs)):
        raise ProtocolError("a logprob is not a finite number")


def _numbers(what: str, data: bytes, kind: Struct) -> Any:
    return [number for (number,) in _records(what, data, kind)]


def _records(what: str, data: bytes, kind: Struct, most: int = MAX_INPUTS_BYTES) -> Any:
    if len(data) % kind.size:
        raise ProtocolError(f"{what} has {len(data)} bytes, which is not a multiple of {kind.size}")
    bounded(f"number of records of {what}", len(data) // kind.size, 0, most)
    return kind.iter_unpack(data)

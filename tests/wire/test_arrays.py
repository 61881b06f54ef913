"""Tests of messages with arrays of inconsistent sizes: the error names the array."""

from __future__ import annotations

import math
import struct
from typing import Any

import pytest

from llamaclust.core.errors import ProtocolError
from llamaclust.core.sampler.params import SamplerChain, SamplingParams
from llamaclust.core.sampler.results import RowResult
from llamaclust.core.sampler.tasks import MatcherRow, SampleTask
from llamaclust.proto import microbatch_pb2, sampling_pb2
from llamaclust.wire.microbatch.codec import encode_microbatch
from llamaclust.wire.microbatch.inputs import encode_inputs
from llamaclust.wire.microbatch.messages import Chunk, Microbatch, Result, SamplingInputs
from llamaclust.wire.microbatch.results import decode_result
from support.wire.slow_codec import decode_inputs, decode_microbatch, encode_result

GOOD_CHUNK = Chunk((1, 2), 0, (0, 1), 1)


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("tokens", b"123", "tokens has 3 bytes, which is not a multiple of 4"),
        ("logprobs", b"", "logprobs is 0, must be within 2..2"),
        ("top_counts", bytes(4), "top_counts is 1, must be within 2..2"),
        ("top_logprobs", bytes(8), "bytes of top_logprobs is 8, must be within 16..16"),
        ("mus", bytes(8), "mus is 1, must be within 2..2"),
        ("following", struct.pack("<4i", 2, 0, 0, 0), "row is 2, must be within 0..1"),
        ("following", struct.pack("<4i", 0, 1, 0, 0), "forced tokens is 1, must be within 0..0"),
        ("following_tokens", bytes(4), "following tokens is 1, must be within 0..0"),
        ("deferred", struct.pack("<i", 0), "row 0 of 2 fails or is deferred, but it has an answer"),
        ("deferred", struct.pack("<3i", 1, 1, 1), "rows that fail or are deferred is 3, must be within 0..2"),
        (
            "matcher_ns",
            struct.pack("<6Q", 0, 1, 0, 2, 0, 3),
            "number of records of matcher_ns is 3, must be within 0..2",
        ),
        ("following", bytes(16 * 8193), "number of records of following is 8193, must be within 0..8192"),
        ("deferred", b"", "row 1 has no answer, and the result does not say why"),
    ],
)
def test_arrays_of_a_result_that_do_not_fit_together_are_refused(field: str, value: bytes, says: str) -> None:
    rows = RowResult(3, -1.5, ((1, -1.0), (2, -1.0))), RowResult(-1, math.nan, is_deferred=True)
    message = sampling_pb2.Result.FromString(encode_result(Result(1, 2, rows)))
    assert len(decode_result(message.SerializeToString()).rows) == 2
    setattr(message, field, value)
    with pytest.raises(ProtocolError, match=says):
        decode_result(message.SerializeToString())


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("tasks", bytes(57), "tasks has 57 bytes, which is not a multiple of 56"),
        ("params", [], "parameters is 0, must be within 0..-1"),
        ("tokens", bytes(4), "tokens of tasks: 2 from 0 on, there are 1"),
        ("breakers", b"", "breakers: 1 from 0 on, there are 0"),
        ("breakers", struct.pack("<2I", 9, 1), "tokens of tasks: 1 from 9 on, there are 3"),
        ("matcher_rows", struct.pack("<3Q", 1, 0, 0), "row with a matcher is 1, must be within 0..0"),
        ("chained", struct.pack("<dIIII", 0, 1, 0, 0, 0), "row with a chain is 1, must be within 0..0"),
    ],
)
def test_arrays_of_inputs_that_do_not_fit_together_are_refused(field: str, value: Any, says: str) -> None:
    params = SamplingParams(chain=SamplerChain())
    task = SampleTask(params, 1, 0, 5, history=(1, 2), breakers=((3,),), matcher=MatcherRow(1, 2))
    message = sampling_pb2.SamplingInputs.FromString(encode_inputs(SamplingInputs(1, 2, (task,))))
    assert decode_inputs(message.SerializeToString())
    if field == "params":
        message.ClearField("params")
    else:
        setattr(message, field, value)
    with pytest.raises(ProtocolError, match=says):
        decode_inputs(message.SerializeToString())


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("chunks", bytes(21), "chunks has 21 bytes, which is not a multiple of 20"),
        ("chunks", b"", "chunks is 0, must be within 1.."),
        ("tokens", bytes(4), "1 tokens for chunks of 2"),
        ("tables", b"", "runs of a table is 1, must be within 1..0"),
        ("tables", struct.pack("<4i", 0, 1, 2, 1), "2 runs of tables, chunks have 1"),
        ("followed", struct.pack("<3Q", 1, 0, 0), "chunk that follows a row is 1, must be within 0..0"),
        ("windows", bytes(16), "2 windows, chunks have 1"),
        ("window_tables", bytes(8), "1 runs of windows, chunks have 0"),
        ("embedded", struct.pack("<3i", 0, 0, 3), "end of embedded rows is 3, must be within 0..2"),
        ("embedded", struct.pack("<6i", 0, 0, 1, 0, 0, 1), "chunk with embedded rows is 0, must be within 1..0"),
        ("adapters", struct.pack("<iif", 0, -1, 1), "adapter is -1, must be within 0.."),
        ("drafts", struct.pack("<3i", 0, -1, 33), "drafts is 33, must be within 0..32"),
    ],
)
def test_arrays_of_a_microbatch_that_do_not_fit_together_are_refused(field: str, value: bytes, says: str) -> None:
    message = microbatch_pb2.Microbatch.FromString(encode_microbatch(Microbatch("m", 1, 7, (GOOD_CHUNK,))))
    setattr(message, field, value)
    with pytest.raises(ProtocolError, match=says):
        decode_microbatch(message.SerializeToString())

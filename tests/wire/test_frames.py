"""Tests of frames between stages: hidden states, failures and timings."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from llamaclust.core.errors import ProtocolError
from llamaclust.core.limits import MAX_BATCH_TOKENS
from llamaclust.wire.microbatch.codec import encode_microbatch
from llamaclust.wire.microbatch.messages import Chunk, Microbatch, Result, StageTiming
from llamaclust.wire.microbatch.results import decode_result
from support.wire.frame_reader import MODEL_ID, reader
from support.wire.slow_codec import encode_frame, encode_result

HEADER = encode_microbatch(Microbatch(MODEL_ID, 1, 0, (Chunk((1, 2), 0, (3, 1), 1),)))


def test_a_frame_carries_the_bits_of_the_hidden_state_without_a_copy() -> None:
    rng = np.random.default_rng(2)
    hidden = rng.standard_normal((2, 12), np.float32)
    hidden[0, :4] = np.nan, np.inf, -0.0, np.finfo(np.float32).smallest_subnormal
    data = encode_frame(HEADER, (StageTiming(2**64 - 1, 2, 3, 4),) * 2, hidden)
    received = reader(12).read(data).hidden
    assert received is not None and received.tobytes() == hidden.tobytes()
    assert np.shares_memory(received, np.frombuffer(data, np.uint8))
    assert received.ctypes.data % 16 == 0
    with pytest.raises(ProtocolError, match="hidden state of 96 bytes, 2 x 11 float32 expected"):
        reader(11).read(data)


@pytest.mark.parametrize("rows", [0, MAX_BATCH_TOKENS + 1])
def test_a_stage_that_says_it_computed_no_rows_is_refused(rows: int) -> None:
    """Predictions divide by the number of rows."""
    timings = (StageTiming(1, 2, 3, 4), StageTiming(1, 2, 3, rows))
    with pytest.raises(ProtocolError, match="rows of a timing"):
        decode_result(encode_result(Result(1, 0, (), timings)))
    with pytest.raises(ProtocolError, match="rows of a timing"):
        reader().read(encode_frame(HEADER, timings))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda data: data[:9], "frame of 9 bytes, shorter than its prefix"),
        (lambda data: b"X" + data[1:], "frame does not begin with 'LCST'"),
        (lambda data: data[:5] + b"\3" + data[6:], "frame kind 3 is not known"),
        (lambda data: data[:6] + b"\0\1" + data[8:], "stages is 256, must be within 0..255"),
        (lambda data: data[:8] + bytes(4) + data[12:], "header bytes is 0, must be within 1.."),
        (lambda data: data + b"!", "its prefix says"),
    ],
)
def test_a_damaged_prefix_is_refused_by_name(damage: Callable[[bytes], bytes], says: str) -> None:
    with pytest.raises(ProtocolError, match=says):
        reader().read(damage(encode_frame(HEADER)))

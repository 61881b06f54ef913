"""Frames between stages: hidden states, failures, timings."""

from __future__ import annotations

import numpy as np
import pytest

from llamaclust.core.errors import ProtocolError
from llamaclust.core.limits import (
    MAX_BATCH_TOKENS,
)
from llamaclust.wire.microbatch.codec import (
    decode_result,
    encode_result,
)
from llamaclust.wire.microbatch.frames import FrameKind, decode_frame, encode_failure, encode_hidden
from llamaclust.wire.microbatch.messages import Result, StageTiming


def test_a_frame_carries_the_bits_of_the_hidden_state_without_a_copy() -> None:
    rng = np.random.default_rng(2)
    hidden = rng.standard_normal((5, 12), np.float32)
    hidden[0, :4] = np.nan, np.inf, -0.0, np.finfo(np.float32).smallest_subnormal
    data = encode_hidden(b"header", (StageTiming(2**64 - 1, 2, 3, 4),) * 2, hidden)
    frame = decode_frame(data)
    assert (frame.kind, frame.header, frame.timings) == (
        FrameKind.HIDDEN,
        b"header",
        (StageTiming(2**64 - 1, 2, 3, 4),) * 2,
    )
    received = frame.hidden(5, 12)
    assert received.tobytes() == hidden.tobytes()
    assert np.shares_memory(received, np.frombuffer(data, np.uint8))
    assert received.ctypes.data % 16 == 0
    with pytest.raises(ProtocolError, match="240 bytes"):
        frame.hidden(5, 11)


@pytest.mark.parametrize("rows", [0, MAX_BATCH_TOKENS + 1])
def test_a_stage_that_says_it_computed_no_rows_is_refused(rows: int) -> None:
    """Predictions divide by them."""
    timings = (StageTiming(1, 2, 3, 4), StageTiming(1, 2, 3, rows))
    with pytest.raises(ProtocolError, match="rows of a timing"):
        decode_result(encode_result(Result(1, 0, (), timings)))
    with pytest.raises(ProtocolError, match="rows of a timing"):
        decode_frame(encode_hidden(b"header", timings, None))


def test_a_failure_frame_is_one_safe_line() -> None:
    frame = decode_frame(encode_failure(b"header", (), "worker b:\nout of \x1b[31mmemory" + "!" * 5000))
    assert frame.failure.startswith("worker b: out of [31mmemory!!!")
    assert len(frame.failure) <= 1000

"""Sampling inputs as they come to the last stage: large ones do not hold up the event loop."""

from __future__ import annotations

import threading

import pytest

from llamaclust.core.errors import ProtocolError
from llamaclust.core.sampling import SampleTask, SamplingParams
from llamaclust.wire.microbatch.codec import encode_inputs
from llamaclust.wire.microbatch.messages import SamplingInputs
from llamaclust.worker.stage import streams
from llamaclust.worker.stage.step_inputs import StepInputs


@pytest.mark.parametrize(("tokens", "is_inline"), [(10, True), (100_000, False)])
async def test_large_inputs_are_decoded_beside_the_event_loop(
    monkeypatch: pytest.MonkeyPatch, tokens: int, is_inline: bool
) -> None:
    threads: list[threading.Thread] = []

    class Inputs(StepInputs):
        @classmethod
        def read(cls, data: bytes) -> StepInputs:
            threads.append(threading.current_thread())
            return StepInputs.read(data)

    monkeypatch.setattr(streams, "StepInputs", Inputs)
    inputs = SamplingInputs(1, 0, (SampleTask(SamplingParams(), 0, 0, 9, history=tuple(range(tokens))),))
    assert (await streams._read(encode_inputs(inputs))).inputs == inputs
    assert (threads == [threading.current_thread()]) == is_inline


@pytest.mark.parametrize("size", [10, 100_000])
async def test_bytes_that_are_no_inputs_break_the_protocol(size: int) -> None:
    with pytest.raises(ProtocolError):
        await streams._read(b"\xff" * size)

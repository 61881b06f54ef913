"""Tests bounds of a last stage's results: a result of another size ends the pipeline and is not kept."""

from __future__ import annotations

import asyncio
import tracemalloc
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from llamaclust.cluster.control.remote.pipeline import RemotePipeline
from llamaclust.cluster.membership.worker_handle import WorkerHandle
from llamaclust.cluster.scheduler.rows.slice import ScheduledMicrobatch
from llamaclust.core.errors import ProtocolError
from llamaclust.core.sampler.params import SamplingParams
from llamaclust.core.sampler.results import RowResult
from llamaclust.core.sampler.tasks import RowTask, SampleTask, ScoreTask
from llamaclust.wire.control.messages import CoordinatorMessage, Loaded
from llamaclust.wire.microbatch.messages import Chunk, Microbatch, Result, SamplingInputs, StageTiming
from llamaclust.wire.microbatch.results import most_result_bytes
from llamaclust.wire.security.credentials import Insecure
from support.wire.control_messages import LOAD, REGISTER
from support.wire.slow_codec import encode_result

MIB = 1 << 20
SAMPLE_ONE = SampleTask(SamplingParams(), 1, 0, 3)


class ScriptedStream:
    """A stream that yields the given messages and then waits."""

    address = "scripted"
    has_message = False

    def __init__(self, sizes: Sequence[int | bytes] = ()) -> None:
        self._left = list(sizes)

    def try_write(self, *messages: bytes) -> bool:
        return True

    async def write(self, *messages: bytes) -> None: ...

    async def read(self) -> bytes:
        if not self._left:
            await asyncio.Event().wait()
        message = self._left.pop(0)
        return bytes(message) if isinstance(message, int) else message


async def _nothing(message: CoordinatorMessage) -> None: ...


def pipeline_of(answers: Sequence[int | bytes]) -> RemotePipeline:
    """Builds a pipeline of workers a and b, the last of which gives these answers."""
    workers = [WorkerHandle(replace(REGISTER, name=name), _nothing, lambda: "", Insecure()) for name in "ab"]
    for worker in workers:
        worker.stages[1] = (replace(LOAD, epoch=1), Loaded(1, 1, 1, 1))
    streams: Any = ScriptedStream(), ScriptedStream(answers), None
    peers: Any = ()
    return RemotePipeline(1, workers, peers, *streams)


def scheduled(number: int, tasks: tuple[RowTask, ...], embedded: int = 0) -> ScheduledMicrobatch:
    chunk = Chunk((1, 2), 0, (1, 1), len(tasks), embedded=(0, embedded))
    return ScheduledMicrobatch(Microbatch("ab", 1, number, (chunk,)), SamplingInputs(1, number, tasks))


@pytest.mark.parametrize(
    ("tasks", "size"),
    [((), 120 * MIB), ((SAMPLE_ONE,), 64 << 10), ((SAMPLE_ONE, ScoreTask(3, 20)), 30 * MIB)],
    ids=["prefill", "a token", "scores"],
)
async def test_a_larger_result_ends_the_pipeline_and_is_not_kept(tasks: tuple[RowTask, ...], size: int) -> None:
    pipeline = pipeline_of([size])
    pipeline.submit(scheduled(0, tasks))
    tracemalloc.start()
    try:
        with pytest.raises(ProtocolError, match=f"a result has {size} bytes; the limit"):
            await pipeline.run(lambda results: None)
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < MIB, f"{held} bytes are held by the error"


async def test_results_that_nobody_asked_for_end_it() -> None:
    pipeline = pipeline_of([encode_result(Result(1, 0))])
    with pytest.raises(ProtocolError, match="the limit for its microbatch is 0"):
        await pipeline.run(lambda results: None)


async def test_damaged_bytes_are_not_kept_by_their_error() -> None:
    pipeline = pipeline_of([b"\xff" * (16 * MIB)])
    pipeline.submit(scheduled(0, (), embedded=2))
    tracemalloc.start()
    try:
        with pytest.raises(ProtocolError, match="damaged"):
            await pipeline.run(lambda results: None)
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < MIB


@pytest.mark.parametrize("rows", [1, 7, 64])
def test_the_largest_honest_result_fits(rows: int) -> None:
    top = tuple((1 << 19, -0.5) for _ in range(128))
    tokens = (1 << 19,) * 64
    full = RowResult(1 << 19, -1.0, top, mu=1.0, forced=tokens, forced_draft=tokens, drafted=tokens[:32])
    failed = RowResult(-1, 0.0, failure="\u6f22" * 2000)
    timing = StageTiming(1 << 63, 1 << 63, 1 << 63, 8192)
    for row in (full, failed):
        data = encode_result(Result(1, 0, (row,) * rows, (timing,) * 255, failure="\u6f22" * 2000))
        assert len(data) <= most_result_bytes(rows, 128 * rows, embeds=False)

"""Tests of a worker's streams: microbatches through stages in one process over real streams, hostile peers, and
failures."""

from __future__ import annotations

import asyncio
import re
import socket
import time
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llamaclust.core.errors import WorkerError
from llamaclust.kernels._native import MicrobatchFrame
from llamaclust.kernels.backend import Logits
from llamaclust.model.loader import Model
from llamaclust.wire.control.messages import Deadlines
from llamaclust.wire.microbatch.codec import encode_microbatch
from llamaclust.wire.microbatch.frames import encode_hidden
from llamaclust.wire.microbatch.inputs import encode_inputs
from llamaclust.wire.microbatch.messages import Chunk, Microbatch, Result, SamplingInputs
from llamaclust.wire.rpc.client import ClientStream, Peer, StreamBrokenError, UnreachableError
from llamaclust.wire.rpc.methods import FORWARD, SAMPLE
from llamaclust.wire.rpc.send_queue import Writable
from llamaclust.wire.rpc.server import Server, ServerStream
from llamaclust.worker.service import StageService
from llamaclust.worker.stage.compute import Compute
from llamaclust.worker.stage.counters import Counters
from llamaclust.worker.stage.loop import Answer, StageContext, StageLoop
from llamaclust.worker.stage.stage_runner import StageRunner
from llamaclust.worker.stage.streams import Neighbours, StageStreams
from support.clusters.real_cluster import microbatches
from support.clusters.stage_chain import DEADLINES, TOKEN, chain, runner_of
from support.models.tiny_model import build_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    return Model.open(build_tiny_model(path, hidden=64, layers=3, heads=4, ffn=96))


@pytest.mark.parametrize("cuts", [(0, 3), (0, 1, 3), (0, 1, 2, 3)], ids=str)
def test_results_come_in_order_with_a_timing_a_stage(model: Model, tmp_path: Path, cuts: tuple[int, ...]) -> None:
    work = microbatches(model.model_id, 1, 9)
    whole = runner_of(model, 0, 3)

    async def run() -> list[Result]:
        async with chain(model, tmp_path, cuts) as stages:
            for microbatch, inputs in work:
                await stages.submit(microbatch, inputs)
            results = [await stages.result() for _ in work]
            await stages.forward.done_writing()
            assert await stages.forward.read() is None
            return results

    for (microbatch, inputs), result in zip(work, asyncio.run(run()), strict=True):
        assert (result.epoch, result.number, result.failure) == (1, microbatch.number, None)
        assert result.rows == whole.finish(whole.run(microbatch, None), inputs)
        assert [timing.rows for timing in result.timings] == [microbatch.rows] * (len(cuts) - 1)
        assert all(timing.compute_ns > 0 and timing.queue_ns > 0 for timing in result.timings)


async def test_sampling_inputs_may_come_late(model: Model, tmp_path: Path) -> None:
    (microbatch, inputs), *_ = microbatches(model.model_id, 1, 1)
    async with chain(model, tmp_path) as stages:
        await stages.submit(microbatch, None)
        await asyncio.sleep(0.05)  # The microbatch usually arrives first; the result is the same otherwise.
        await stages.sample.write(encode_inputs(inputs))
        assert (await stages.result()).failure is None


async def test_sampling_inputs_that_never_come_fail_their_microbatch_alone(model: Model, tmp_path: Path) -> None:
    (first, first_inputs), (second, second_inputs), *_ = microbatches(model.model_id, 1, 2)
    async with chain(model, tmp_path, deadlines=replace(DEADLINES, sampling_inputs_s=0.2)) as stages:
        await stages.submit(first, None)
        failed = await stages.result()
        assert failed.failure is not None
        assert "worker w1 (layers [1, 3)): sampling inputs of microbatch 0 took longer than 0.2 s" in failed.failure
        await stages.sample.write(encode_inputs(first_inputs))  # The inputs are too late and are dropped.
        await stages.sample.write(encode_inputs(second_inputs))
        await stages.submit(second, None)
        assert (await stages.result()).failure is None


def test_inputs_that_break_the_protocol_end_both_streams_at_once(
    model: Model, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def run() -> list[str]:
        async with chain(model, tmp_path, deadlines=Deadlines(sampling_inputs_s=60.0, forward_s=60.0)) as stages:
            await stages.sample.write(b"\xff\xff")
            await stages.submit(_good(model), None)
            return [await _why(stream) for stream in (stages.sample, stages.forward)]

    for why in asyncio.run(asyncio.wait_for(run(), 20.0)):
        assert "SamplingInputs: damaged" in why
    assert "Traceback" not in caplog.text


async def _why(stream: ClientStream) -> str:
    """Returns the error that ends the stream."""
    with pytest.raises(WorkerError) as caught:
        await stream.read()
    return str(caught.value)


def test_a_microbatch_that_fails_is_answered_in_its_turn(model: Model, tmp_path: Path) -> None:
    work = microbatches(model.model_id, 1, 4)

    async def run() -> list[Result]:
        async with chain(model, tmp_path, (0, 1, 2, 3)) as stages:
            for runner in stages.runners[1:]:
                _fail_second(runner)
            for microbatch, inputs in work:
                await stages.submit(microbatch, inputs)
            return [await stages.result() for _ in work]

    results = asyncio.run(run())
    assert [result.number for result in results] == [0, 1, 2, 3]
    assert [result.failure for result in results] == [
        None,
        "worker w1 (layers [1, 2)): MemoryError: no more",
        "worker w2 (layers [2, 3)): MemoryError: no more",
        None,
    ]
    assert [len(result.timings) for result in results] == [3, 1, 2, 3]


def _fail_second(runner: StageRunner) -> None:
    """Fails the second microbatch that reaches this stage."""
    whole, numbers = runner.run_frame, count()

    def run_frame(frame: MicrobatchFrame) -> Logits:
        if next(numbers) == 1:
            raise MemoryError("no more")
        return whole(frame)

    runner.run_frame = run_frame  # type: ignore[method-assign]


def _good(model: Model) -> Microbatch:
    return Microbatch(model.model_id, 1, 0, (Chunk((1,), 0, (0, 1), 1),))


def _hostile(model: Model) -> dict[str, bytes]:
    good = _good(model)
    changed = {
        "another epoch": replace(good, epoch=2),
        "number out of turn": replace(good, number=1),
        "another model": replace(good, model_id="00"),
        "foreign token": replace(good, chunks=(Chunk((320,), 0, (0, 1), 1),)),
        "foreign block": replace(good, chunks=(Chunk((1,), 0, (64, 1), 1),)),
        "too many rows": replace(good, chunks=(Chunk((1,) * 65, 0, (0, 5), 1),)),
    }
    frames = {name: encode_hidden(encode_microbatch(microbatch)) for name, microbatch in changed.items()}
    frames["no frame"] = b"GET / HTTP/1.1"
    frames["empty"] = b""
    frames["hidden state for a first stage"] = encode_hidden(encode_microbatch(good), np.zeros((1, 64), np.float32))
    return frames


REASONS = {
    "another epoch": "found 0 of epoch 0.2",
    "number out of turn": "expected 0 of epoch 0.1, found 1",
    "another model": "microbatch of model 00, this stage holds",
    "foreign token": "token 320 is not in the vocabulary",
    "foreign block": "KV block 64",
    "too many rows": "microbatch with 65 tokens",
    "no frame": "frame of 14 bytes",
    "empty": "frame of 0 bytes",
    "hidden state for a first stage": "hidden state of 256 bytes",
}


@pytest.mark.parametrize("name", REASONS)
async def test_a_frame_that_breaks_the_protocol_ends_the_stream_by_name(
    model: Model, tmp_path: Path, name: str
) -> None:
    async with chain(model, tmp_path, (0, 3)) as stages:
        await stages.forward.write(_hostile(model)[name])
        with pytest.raises(StreamBrokenError, match=re.escape(REASONS[name])):
            await stages.forward.read()


@pytest.mark.parametrize("place", range(3))
async def test_a_stage_that_breaks_the_protocol_is_named_and_not_its_receiver(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: int
) -> None:
    """The last stage sends tokens to the first one."""
    send_answers, send_tokens = StageLoop._send_answers, StageLoop._send_tokens

    def is_faulty(loop: StageLoop, *, last: bool) -> bool:
        program = loop.runner.program
        return program.start == place and program.is_last == last

    async def answers(loop: StageLoop, outlet: Writable, limit: Any, given: list[Answer]) -> None:
        spoiled = [Answer(b"rubbish")] if is_faulty(loop, last=False) else given
        await send_answers(loop, outlet, limit, spoiled)

    async def tokens(loop: StageLoop, first: Writable | None, limit: Any, given: list[Answer]) -> None:
        if first is not None and is_faulty(loop, last=True):
            await first.write(b"rubbish")
        else:
            await send_tokens(loop, first, limit, given)

    monkeypatch.setattr(StageLoop, "_send_answers", answers)
    monkeypatch.setattr(StageLoop, "_send_tokens", tokens)
    async with chain(model, tmp_path, (0, 1, 2, 3)) as stages:
        await stages.submit(*microbatches(model.model_id, 1, 1)[0])
        with pytest.raises(WorkerError) as caught:
            await stages.forward.read()
        assert caught.value.worker == f"w{place}", caught.value


async def test_a_hidden_state_of_another_size_is_refused(model: Model, tmp_path: Path) -> None:
    async with chain(model, tmp_path) as stages:
        forward = stages.last.open(FORWARD, epoch=1)
        with pytest.raises(StreamBrokenError, match="second stream"):
            await forward.opened()
    async with chain(model, tmp_path, (0, 3)) as stages:
        hidden = encode_hidden(encode_microbatch(_good(model)), np.zeros((1, 63), np.float32))
        await stages.forward.write(hidden)
        with pytest.raises(StreamBrokenError, match="252 bytes, 1 x 0"):
            await stages.forward.read()


async def test_streams_that_do_not_belong_are_refused_by_name(model: Model, tmp_path: Path) -> None:
    async with chain(model, tmp_path) as stages:
        for peer, method, epoch, why in (
            (stages.first, FORWARD, 2, "worker w0 holds no stage for epoch 0.2"),
            (stages.first, SAMPLE, 1, "not the last"),
            (stages.first, FORWARD, 1, "second stream"),
            (stages.last, SAMPLE, 1, "second sampling stream"),
            (stages.first, FORWARD, None, "is not a number"),
        ):
            with pytest.raises(StreamBrokenError, match=why):
                await peer.open(method, epoch=epoch).opened()
        for microbatch, inputs in microbatches(model.model_id, 1, 2):  # other streams continue
            await stages.submit(microbatch, inputs)
            assert (await stages.result()).failure is None


def test_bad_sampling_inputs_end_the_stream_by_name(model: Model, tmp_path: Path) -> None:
    async def run(data: bytes, why: str) -> None:
        async with chain(model, tmp_path, (0, 3)) as stages:
            await stages.sample.write(data)
            with pytest.raises(StreamBrokenError, match=why):
                await stages.sample.read()

    asyncio.run(run(b"\xff", "damaged"))
    asyncio.run(run(encode_inputs(SamplingInputs(1, 1, ())), r"expected 0 of epoch 0\.1, found 1 of epoch 0\.1"))
    asyncio.run(run(encode_inputs(SamplingInputs(2, 0, ())), r"expected 0 of epoch 0\.1, found 0 of epoch 0\.2"))


async def test_another_number_of_tasks_than_rows_ends_the_stream(model: Model, tmp_path: Path) -> None:
    async with chain(model, tmp_path, (0, 3)) as stages:
        await stages.submit(_good(model), SamplingInputs(1, 0, ()))
        with pytest.raises(StreamBrokenError, match="0 tasks for 1 output rows"):
            await stages.forward.read()


async def test_the_loss_of_the_next_stage_reaches_the_coordinator(model: Model, tmp_path: Path) -> None:
    compute = Compute()
    runner = runner_of(model, 0, 1)
    service = StageService("w0")
    absent = Peer(f"unix:{tmp_path}/absent.sock", TOKEN)
    told: list[tuple[Peer, str]] = []

    async def tell(peer: Peer, why: str) -> None:
        told.append((peer, why))

    service.add(StageStreams(1, runner, StageContext("w0", compute, Counters()), DEADLINES, Neighbours(tell, absent)))
    server = await Server.start(f"unix:{tmp_path}/a.sock", TOKEN, service.handlers)
    first = Peer(server.address, TOKEN)
    with pytest.raises(StreamBrokenError, match=r"connection to unix:.*absent\.sock lost"):
        await first.open(FORWARD, epoch=1).opened()
    ((peer, why),) = told
    assert peer is absent and "absent.sock lost" in why
    await first.close()
    await server.stop(0.0)
    await service.remove(1)
    compute.close()


async def test_only_a_connection_that_fails_is_told(model: Model, tmp_path: Path) -> None:
    """A stage that ends its stream with an error is not reported, since it can be reached."""

    told: list[str] = []

    async def tell(peer: Peer, why: str) -> None:
        told.append(why)

    async def refusing(stream: ServerStream) -> None:
        await stream.accept()
        raise WorkerError("no more")

    other = await Server.start(f"unix:{tmp_path}/b.sock", TOKEN, {FORWARD: refusing})
    compute, service = Compute(), StageService("w0")
    neighbours = Neighbours(tell, Peer(other.address, TOKEN))
    service.add(StageStreams(1, runner_of(model, 0, 1), StageContext("w0", compute, Counters()), DEADLINES, neighbours))
    server = await Server.start(f"unix:{tmp_path}/a.sock", TOKEN, service.handlers)
    first = Peer(server.address, TOKEN)
    stream = first.open(FORWARD, epoch=1)
    with pytest.raises(StreamBrokenError, match="no more"):
        await stream.opened()  # may fail if the next stage has already ended
        await stream.read()
    assert not told
    await first.close()
    await asyncio.gather(server.stop(0.0), other.stop(0.0))
    await service.remove(1)
    compute.close()


async def test_an_unanswered_connection_fails_in_time() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        peer = Peer(f"127.0.0.1:{silent.getsockname()[1]}", TOKEN, patience_s=1.0)
        peer.open(FORWARD, epoch=1)
        begun = time.monotonic()
        with pytest.raises(UnreachableError, match=r"connection to 127\.0\.0\.1:\d+ took longer than 1 s"):
            await peer.connected()
        assert time.monotonic() - begun < 15.0
        await peer.close()

"""Tests of the stage loop without streams: when it computes and when it sends."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from math import inf
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest

from llamaclust.core.errors import DeadlineError, ProtocolError, WorkerError
from llamaclust.core.gpus import DeviceLayers
from llamaclust.core.sampler.params import SamplingParams
from llamaclust.core.sampler.tasks import SampleTask
from llamaclust.model.loader import Model
from llamaclust.wire.microbatch.codec import encode_microbatch
from llamaclust.wire.microbatch.frames import encode_hidden
from llamaclust.wire.microbatch.inputs import encode_inputs
from llamaclust.wire.microbatch.messages import Chunk, Microbatch, SamplingInputs
from llamaclust.wire.rpc.deadlines import recurring_deadline
from llamaclust.worker.stage.arrival import Arrival
from llamaclust.worker.stage.compute import INLINE_NS, Compute
from llamaclust.worker.stage.counters import Counters
from llamaclust.worker.stage.incoming import Incoming
from llamaclust.worker.stage.loop import Answer, StageContext, StageLoop
from llamaclust.worker.stage.step_inputs import StepInputs
from support.clusters.stage_chain import DEADLINES, runner_of
from support.models.tiny_model import build_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    return Model.open(build_tiny_model(path, hidden=64, layers=3, heads=4, ffn=96))


def test_wire_time_is_not_what_is_computed_while_a_result_is_sent(model: Model) -> None:
    counters, computed_ns, now_ns = Counters(), 50_000_000, 0

    class Outlet:
        async def write(self, *_: bytes) -> None:
            nonlocal now_ns
            now_ns += computed_ns + 7
            counters.busy_ns += computed_ns

    async def run() -> int:
        compute = Compute()
        loop = StageLoop(1, runner_of(model, 0, 3), StageContext("w", compute, counters), DEADLINES)
        async with recurring_deadline("handing on", 5.0) as limit:
            await loop._send_answers(Outlet(), limit, [Answer(b"")])
        compute.close()
        return loop._wire_ns

    with patch("llamaclust.worker.stage.loop.perf_counter_ns", lambda: now_ns):
        assert asyncio.run(run()) == 7


@pytest.mark.parametrize(
    ("layers", "changes", "width", "why"),
    [
        ((0, 3), {"model_id": "f" * 64}, None, "microbatch of model f"),
        ((0, 3), {"chunks": (Chunk((1, 2), 0, (4000, 1), 1),)}, None, "KV block 4000"),
        ((0, 1), {"chunks": (Chunk((1, 1 << 19), 0, (0, 1), 1),)}, None, "token 524288"),
        ((1, 3), {"chunks": (Chunk((1,), 90, (0, 1), 1),)}, 64, "block table of 1 blocks for 91"),
        ((1, 3), {}, 63, "hidden"),
        ((0, 3), {"chunks": (Chunk((0,), 2, (0, 1), 1, (0, 0)),)}, None, "sampled no token for row 0"),
    ],
)
async def test_a_leader_announces_no_microbatch_that_does_not_fit(
    model: Model, layers: tuple[int, int], changes: dict[str, Any], width: int | None, why: str
) -> None:
    """The stream ends as on a single worker: its sender is at fault, not a member of the group."""
    announced: list[int] = []

    def step(arrival: Arrival, followed: object, adapters: bytes, checked: object) -> nullcontext[None]:
        announced.append(arrival.frame.rows)
        return nullcontext()

    leader: Any = SimpleNamespace(step=step)
    loop = StageLoop(1, runner_of(model, *layers), StageContext("w", Compute(), Counters(), leader), DEADLINES)
    fits = Microbatch(model.model_id, 1, 0, (Chunk((1, 2), 0, (0, 1), 1),))
    hidden = None if width is None else np.ones((len(fits.chunks[0].tokens), 64), np.float32)
    loop._run_layers(loop.receive(encode_hidden(encode_microbatch(fits), hidden), 0))
    assert announced == [2]
    wrong = replace(fits, number=1, **changes)
    if width is not None:
        hidden = np.ones((sum(len(chunk.tokens) for chunk in wrong.chunks), width), np.float32)
    with pytest.raises((ProtocolError, WorkerError), match=why):
        loop._run_layers(loop.receive(encode_hidden(encode_microbatch(wrong), hidden), 1))
    assert announced == [2]


@pytest.mark.parametrize("is_local", [True, False])
async def test_a_result_that_can_wait_is_sent_after_the_first_stage_has_begun(model: Model, is_local: bool) -> None:
    """The second step is a lookahead step, the first one is not."""
    sent: dict[str, list[float]] = {"tokens": [], "result": []}

    async def read() -> bytes | None:
        if not frames:
            await asyncio.sleep(0.05)
            return None
        await asyncio.sleep(0.005)  # one round of the pipeline
        return frames.pop(0)

    async def tokens(*_: bytes) -> None:
        sent["tokens"].append(time.perf_counter())

    async def result(*_: bytes) -> None:
        sent["result"].append(time.perf_counter())

    chunks = (Chunk((7,), 0, (0, 16), 1), Chunk((0,), 1, (0, 16), 1, depends_on=(0, 0)))
    microbatches = [Microbatch(model.model_id, 1, number, (chunk,)) for number, chunk in enumerate(chunks)]
    frames = [encode_hidden(encode_microbatch(each), np.zeros((1, 64), np.float32)) for each in microbatches]
    compute = Compute()
    loop = StageLoop(1, runner_of(model, 1, 3), StageContext("w", compute, Counters()), DEADLINES)
    for number in range(2):
        task = SampleTask(SamplingParams(), 0, 0, number)
        loop.put_inputs(StepInputs.read(encode_inputs(SamplingInputs(1, number, (task,)))))
    stream: Any = SimpleNamespace(read=read, is_local=is_local, has_message=False)
    waits = 0
    wait = Incoming.wait

    async def counted(incoming: Incoming, timeout_s: float) -> None:
        nonlocal waits
        waits += 1
        await wait(incoming, timeout_s)

    async with asyncio.timeout(60):
        with patch.object(Incoming, "wait", counted):
            await loop.run(stream, SimpleNamespace(write=result), SimpleNamespace(write=tokens))
    compute.close()
    assert (len(sent["tokens"]), len(sent["result"]), waits) == (2, 2, int(is_local))
    assert all(after > before for before, after in zip(sent["tokens"], sent["result"], strict=True))
    assert not is_local or sent["result"][1] - sent["tokens"][1] >= 0.001


@pytest.mark.parametrize(("start", "end", "receiver"), [(0, 1, "b"), (1, 2, "c"), (1, 3, None)])
async def test_a_stage_that_takes_nothing_is_named_and_heartbeats_say_what_was_sent(
    model: Model, start: int, end: int, receiver: str | None
) -> None:
    hidden = None if start == 0 else np.zeros((1, 64), np.float32)
    frame = encode_hidden(encode_microbatch(Microbatch(model.model_id, 1, 0, (Chunk((7,), 0, (0, 16), 0),))), hidden)
    frames, never = [frame], asyncio.Event()

    async def read() -> bytes:
        if not frames:
            await never.wait()
        return frames.pop()

    async def write(*_: bytes) -> None:
        assert loop.progress.sent == 1
        await never.wait()

    compute = Compute()
    deadlines = replace(DEADLINES, forward_s=0.05)
    loop = StageLoop(1, runner_of(model, start, end), StageContext("a", compute, Counters()), deadlines)
    if end == 3:
        loop.put_inputs(StepInputs.read(encode_inputs(SamplingInputs(1, 0, ()))))
    assert (loop.progress.received, loop.progress.sent) == (0, 0)
    stream: Any = SimpleNamespace(read=read, is_local=False, has_message=False)
    async with asyncio.timeout(60):
        with pytest.raises(DeadlineError, match="forwarding a microbatch") as caught:
            await loop.run(stream, SimpleNamespace(write=write), receiver=receiver)
    compute.close()
    assert caught.value.worker == receiver


def test_the_first_chunk_with_a_long_context_is_not_expected_to_be_short(model: Model) -> None:
    class Recording(Compute):
        async def run(self, job: Callable[[], Any], *, expected_ns: int = INLINE_NS, limit_s: float = inf) -> Any:
            seen.append(expected_ns)
            return await super().run(job, expected_ns=expected_ns, limit_s=limit_s)

    async def run() -> None:
        compute = Recording()
        loop = StageLoop(1, runner_of(model, 0, 1), StageContext("w", compute, Counters()), DEADLINES)
        for number, position in enumerate((0, 0, 240, 240)):
            microbatch = Microbatch(model.model_id, 1, number, (Chunk((1,) * 8, position, (0, 16), 0),))
            await loop.compute(loop.receive(encode_hidden(encode_microbatch(microbatch)), number))
        compute.close()

    seen: list[int] = []
    with patch("llamaclust.worker.stage.loop.perf_counter_ns", lambda: 0):
        asyncio.run(run())
    assert [expected_ns < INLINE_NS for expected_ns in seen] == [False, True, False, True]


@pytest.mark.parametrize(
    ("devices", "limited"),
    [
        ((), False),
        ((DeviceLayers("cuda:0", 0, 3),), True),
        ((DeviceLayers("cpu", 0, 1), DeviceLayers("cuda:0", 1, 3)), False),
        ((DeviceLayers("cuda:0", 0, 3, cpu_moe=(1,)),), False),
    ],
    ids=["cpu", "gpu", "layers in RAM", "experts in RAM"],
)
async def test_steps_on_gpus_have_a_limit_once_their_kind_is_known(
    model: Model, devices: tuple[DeviceLayers, ...], limited: bool
) -> None:
    class Recording(Compute):
        def queue(
            self, job: Callable[[], Any], *, limit_s: float = inf, expected_ns: float = inf
        ) -> asyncio.Future[Any]:
            seen.append(limit_s)
            return super().queue(job, limit_s=limit_s, expected_ns=expected_ns)

    seen: list[float] = []
    compute, runner = Recording(), runner_of(model, 0, 3)
    runner.devices = devices
    loop = StageLoop(1, runner, StageContext("w", compute, Counters()), DEADLINES)
    for number in range(3):
        chunk = Chunk((0,), number, (0, 16), 1, depends_on=(number - 1, 0) if number else None)
        frame = encode_hidden(encode_microbatch(Microbatch(model.model_id, 1, number, (chunk,))))
        task = SampleTask(SamplingParams(0.8, 40), 11, 0, number)
        loop.put_inputs(StepInputs.read(encode_inputs(SamplingInputs(1, number, (task,)))))
        answer = await (await loop.compute(loop.receive(frame, number)))
        assert answer.sampled is not None and answer.sampled.tokens
    compute.close()
    assert [limit_s < inf for limit_s in seen[-2:]] == [False, limited]


async def test_an_answer_that_cannot_be_made_ends_the_stream_while_no_microbatch_comes(model: Model) -> None:
    """The thread computes the step's answer while the next microbatch is read."""

    class Queued(StageLoop):
        async def compute(self, arrival: Any) -> asyncio.Future[Answer]:
            answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
            asyncio.get_running_loop().call_later(0.05, answer.set_exception, ProtocolError("no such frame"))
            return answer

    async def read() -> bytes:
        if not microbatches_left:
            await asyncio.Event().wait()
        return microbatches_left.pop()

    microbatch = Microbatch(model.model_id, 1, 0, (Chunk((1,), 0, (0, 1), 0),))
    microbatches_left = [encode_hidden(encode_microbatch(microbatch))]
    compute = Compute()
    loop = Queued(1, runner_of(model, 0, 3), StageContext("w", compute, Counters()), DEADLINES)
    stream: Any = SimpleNamespace(read=read, is_local=False, has_message=False)
    async with asyncio.timeout(60):
        with pytest.raises(ProtocolError, match="no such frame"):
            await loop.run(stream, stream)
    compute.close()

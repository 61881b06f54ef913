"""Tests of a coordinator's requests that outlast its membership."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from llamaclust.model.gguf.model_file import ModelFile, open_model
from llamaclust.model.gguf.tensors import Tensor
from llamaclust.model.weights import manifest
from llamaclust.wire.control.messages import Deadlines, Load, RequestFailed, WorkerMessage
from llamaclust.wire.control.profiles import ProfileWorker
from llamaclust.wire.control.weights import FindWeights, WeightSources
from llamaclust.wire.security.credentials import Insecure
from llamaclust.worker.membership import Member
from llamaclust.worker.requests import Requests
from llamaclust.worker.service import StageService
from llamaclust.worker.session import Session
from llamaclust.worker.stage.counters import Counters
from llamaclust.worker.weights import load
from llamaclust.worker.weights.weights import Progress, Weights
from llamaclust.worker.worker import Worker
from support.models.tiny_model import build_tiny_model
from support.wire.control_messages import LOAD


async def test_a_profile_does_not_begin_beside_one_of_an_ended_membership() -> None:
    begun, may_end, measuring = threading.Semaphore(0), threading.Event(), threading.Lock()
    overlapped: list[bool] = []
    answers: list[WorkerMessage] = []

    def measure(model: object, quant_types: object, progress: object) -> object:
        overlapped.append(not measuring.acquire(blocking=False))
        begun.release()
        may_end.wait(10)
        measuring.release()
        raise MemoryError("what it measured is of no interest")

    async def send(message: WorkerMessage) -> None:
        answers.append(message)

    nothing: Any = SimpleNamespace()
    device: Any = SimpleNamespace(measure=measure)
    worker = Worker("a", device, StageService("a"), nothing, nothing)
    first, second = (Requests(Session(worker, nothing, Deadlines(), Counters(), send), nothing) for _ in range(2))
    async with asyncio.timeout(60):
        ended = asyncio.create_task(first.answer(ProfileWorker()))
        await asyncio.to_thread(begun.acquire)
        ended.cancel()
        later = asyncio.create_task(second.answer(ProfileWorker()))
        await asyncio.sleep(0)
        assert worker.exclusive.locked() and not ended.done()
        may_end.set()
        await later
    assert ended.cancelled() and overlapped == [False, False]
    (answer,) = answers
    assert isinstance(answer, RequestFailed) and "of no interest" in answer.failure.message


async def test_a_load_ends_measurements_that_the_coordinator_no_longer_awaits() -> None:
    answers: list[WorkerMessage] = []
    begun, loaded, ends = threading.Event(), asyncio.Event(), threading.Event()

    def measure(model: object, quant_types: object, progress: Callable[[int], None]) -> object:
        while not ends.wait(0.001):
            progress(0)
            begun.set()
        raise MemoryError("the measurement was not cancelled")

    async def send(message: WorkerMessage) -> None:
        answers.append(message)

    async def load(order: Load) -> None:
        async with worker.exclusive:
            loaded.set()

    nothing: Any = SimpleNamespace()
    device: Any = SimpleNamespace(measure=measure)
    worker = Worker("a", device, StageService("a"), nothing, nothing)
    session = Session(worker, nothing, Deadlines(), Counters(), send)
    requests, loads = Requests(session, nothing), cast("Any", SimpleNamespace(load=load))
    measuring = [asyncio.create_task(requests.answer(ProfileWorker())) for _ in range(2)]
    try:
        assert await asyncio.to_thread(begun.wait, 10)
        Member(worker, Insecure())._dispatch(LOAD, session, loads, requests)
        async with asyncio.timeout(10):
            await loaded.wait()
    finally:
        ends.set()
    await asyncio.gather(*measuring)
    assert [type(answer) for answer in answers] == [RequestFailed] * 2
    assert all("the measurement was cancelled" in str(answer) for answer in answers)


async def _found(weights: Weights, model: ModelFile) -> None:
    async def send(message: WorkerMessage) -> None:
        """Drops it, because the membership ends."""

    nothing: Any = SimpleNamespace()
    session = Session(Worker("a", nothing, StageService("a"), nothing, weights), nothing, Deadlines(), Counters(), send)
    await Requests(session, nothing).answer(FindWeights(str(model.path), model.identity, describe=True))


async def _opened(weights: Weights, model: ModelFile) -> None:
    nothing: Any = None
    order: Any = SimpleNamespace(model_path=str(model.path), model_id=model.identity)
    order.weights = WeightSources("ab" * 32, 1, ())
    async with load._Files(weights, nothing, Progress()) as files:
        await files.open_model(order)


@pytest.mark.parametrize("find", [_found, _opened])
async def test_a_file_is_not_read_after_a_membership_ends(
    find: Callable[[Weights, ModelFile], Coroutine[None, None, None]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each thread that hashes the file may end its piece, and each tensor has many."""
    begun, may_end, pieces = threading.Event(), threading.Event(), count()

    def read_into(tensor: Tensor, piece: memoryview, start: int) -> None:
        next(pieces)
        begun.set()
        may_end.wait()

    monkeypatch.setattr(manifest, "_READ_BYTES", 64)
    monkeypatch.setattr(Tensor, "read_into", read_into)
    model = open_model(build_tiny_model(tmp_path / "m.gguf"))
    asking = asyncio.create_task(find(Weights(), model))
    try:
        assert await asyncio.to_thread(begun.wait, 60)
        asking.cancel()
        for _ in range(10):
            await asyncio.sleep(0)
    finally:
        may_end.set()
    await asyncio.gather(asking, return_exceptions=True)
    await asyncio.get_running_loop().shutdown_default_executor()
    assert asking.cancelled() and next(pieces) <= len(model.tensors)

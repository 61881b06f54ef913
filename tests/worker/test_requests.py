"""Tests of a coordinator's requests that outlast its membership."""

from __future__ import annotations

import asyncio
import threading
from types import SimpleNamespace
from typing import Any

from llamaclust.wire.control.messages import Deadlines, RequestFailed, WorkerMessage
from llamaclust.wire.control.profiles import ProfileWorker
from llamaclust.worker.requests import Requests
from llamaclust.worker.service import StageService
from llamaclust.worker.session import Session
from llamaclust.worker.stage.counters import Counters
from llamaclust.worker.worker import Worker


async def test_a_profile_does_not_begin_beside_one_of_an_ended_membership() -> None:
    begun, may_end, measuring = threading.Semaphore(0), threading.Event(), threading.Lock()
    overlapped: list[bool] = []
    answers: list[WorkerMessage] = []

    def measure(model: object, quant_types: object) -> object:
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

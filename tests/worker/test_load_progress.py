"""Tests of the progress that a worker reports of a load, which extends the load's deadline only if it increases."""

from __future__ import annotations

import asyncio
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest

from llamaclust.core.errors import InsufficientMemoryError
from llamaclust.wire.control.messages import Deadlines, LoadFailed, LoadProgress, WorkerMessage
from llamaclust.worker import loads
from llamaclust.worker.loads import Loads
from llamaclust.worker.service import StageService
from llamaclust.worker.session import Session
from llamaclust.worker.stage.compute import Compute
from llamaclust.worker.stage.counters import Counters
from llamaclust.worker.weights.weights import Progress
from llamaclust.worker.worker import Worker

PARTS: list[tuple[int, int | None]] = [(30, 20), (7, None), (30, 20)]
"""Total and weight bytes of an encoder, a file that is hashed, and a stage that fetches 10 bytes first."""


async def test_each_part_of_a_load_continues_the_numbers_of_the_earlier_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[WorkerMessage] = []
    reported = asyncio.Event()

    async def send(message: WorkerMessage) -> None:
        answers.append(message)
        reported.set()

    async def reports() -> None:
        """Waits for a report that was made after this call."""
        for _ in range(2):
            reported.clear()
            await reported.wait()

    async def count(progress: Progress, parts: list[tuple[int, int | None]]) -> None:
        for total_bytes, weight_bytes in parts:
            progress.begin(total_bytes, weight_bytes)
            for part_bytes in (0, total_bytes // 2, total_bytes - total_bytes // 2):
                progress.add(part_bytes)
                await reports()

    async def load_encoder(wanted: object, device: object, progress: Progress, *_: object) -> Any:
        await progress.during(count(progress, PARTS[:1]), 0.001)
        memory = SimpleNamespace(total_bytes=1)
        return SimpleNamespace(memory=memory, reserved_bytes=0, close=lambda: None)

    async def load_stage(order: object, device: object, progress: Progress, *_: object) -> Any:
        await progress.during(count(progress, PARTS[1:]), 0.001)
        raise InsufficientMemoryError("this test loads no stage")

    monkeypatch.setattr(loads, "load_encoder", load_encoder)
    monkeypatch.setattr(loads, "load_stage", load_stage)
    anything: Any = SimpleNamespace(received_bytes=0)
    worker = Worker("a", anything, StageService("a"), Compute(), anything)
    limits = SimpleNamespace(expert_shards=1)
    fields = {"epoch": 1, "model_path": "m.gguf", "model_id": "m", "start": 0, "end": 2, "encoder": object()}
    order: Any = SimpleNamespace(**fields, exclusive=False, limits=limits, group=None)
    async with asyncio.timeout(60):
        await Loads(Session(worker, anything, Deadlines(), Counters(), send)).load(order)
    assert isinstance(answers.pop(), LoadFailed)
    seen = [(each.done_bytes, each.total_bytes) for each in answers if isinstance(each, LoadProgress)]
    assert list(dict.fromkeys(seen)) == [
        (0, 20), (10, 20), (20, 20), (20, 27), (23, 27), (27, 27), (27, 47), (37, 47), (47, 47)
    ]  # fmt: skip
    assert all(before[0] <= after[0] for before, after in pairwise(seen))

"""Tests of loads that first free the model's other stages, and of what these leave in memory."""

from __future__ import annotations

import weakref
from types import SimpleNamespace
from typing import Any

import pytest

from llamaclust.core.errors import InsufficientMemoryError
from llamaclust.kernels.backend import CacheCounts
from llamaclust.wire.control.messages import Deadlines, Failure, Loaded, LoadFailed, WorkerMessage
from llamaclust.worker import loads
from llamaclust.worker.loads import Loads
from llamaclust.worker.service import StageService
from llamaclust.worker.session import Session
from llamaclust.worker.stage.compute import Compute
from llamaclust.worker.stage.counters import Counters
from llamaclust.worker.worker import Worker


class _Weights:
    """The weights of a stage that is freed."""


def stage(weights: _Weights) -> Any:
    async def close() -> None:
        """Frees nothing, because `weights` may be referenced elsewhere."""

    runner = SimpleNamespace(model_id="m", weights=weights, experts_cache=CacheCounts())
    return SimpleNamespace(epoch=1, runner=runner, close=close)


SHORT = InsufficientMemoryError("7 MiB are missing")
ORDER: Any = SimpleNamespace(
    epoch=2,
    model_id="m",
    start=0,
    end=2,
    exclusive=True,
    limits=SimpleNamespace(expert_shards=1),
    encoder=None,
    group=None,
    devices=(),
    adapters=(),
    model_path="m.gguf",
    next_address=None,
    first_address=None,
    previous_worker=None,
    last_worker=None,
)


@pytest.mark.parametrize(
    ("has_room", "fits", "has_tiles", "attempts"),
    [
        (True, True, False, [True]),
        (False, True, False, [True, False]),
        (False, False, False, [True, False]),
        (False, True, True, [True, True]),
    ],
)
async def test_weights_of_freed_stages_stay_in_memory_while_there_is_room(
    has_room: bool, fits: bool, has_tiles: bool, attempts: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    answers: list[WorkerMessage] = []
    found: list[bool] = []  # Whether the freed stage's weights are in memory, for each attempt.
    weights = _Weights()
    held = weakref.ref(weights)

    async def load_stage(*_: Any) -> Any:
        found.append(held() is not None)
        has_waited = has_tiles and len(found) > 1
        if not (has_room or has_waited or (fits and held() is None)):
            raise SHORT
        return SimpleNamespace(memory=SimpleNamespace(weight_bytes=1, kv_bytes=2, workspace_bytes=3), samples=False)

    async def send(message: WorkerMessage) -> None:
        answers.append(message)

    async def last_tiles(_: StageService) -> bool:
        return has_tiles

    monkeypatch.setattr(StageService, "last_tiles", last_tiles)
    monkeypatch.setattr(loads, "load_stage", load_stage)
    monkeypatch.setattr(loads, "StageStreams", lambda epoch, *_: SimpleNamespace(epoch=epoch))
    anything: Any = SimpleNamespace(received_bytes=0)
    worker = Worker("a", anything, StageService("a"), Compute(), anything)
    worker.service.add(stage(weights))
    del weights
    await Loads(Session(worker, anything, Deadlines(), Counters(), send)).load(ORDER)
    failed = LoadFailed(2, Failure("InsufficientMemoryError", str(SHORT)))
    assert answers == [Loaded(2, 1, 2, 3) if fits else failed] and found == attempts
    assert held() is None


async def test_a_kept_stage_without_room_for_its_adapters_is_loaded_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[WorkerMessage] = []
    freed: list[str] = []
    kept = SimpleNamespace(close=lambda: freed.append("the kept stage"))

    async def take_kept(*_: Any) -> Any:
        return kept

    async def adapt(*_: Any) -> None:
        raise SHORT

    async def load_stage(*_: Any) -> Any:
        assert freed
        return SimpleNamespace(memory=SimpleNamespace(weight_bytes=1, kv_bytes=2, workspace_bytes=3), samples=False)

    async def send(message: WorkerMessage) -> None:
        answers.append(message)

    monkeypatch.setattr(StageService, "take_kept", take_kept)
    monkeypatch.setattr(Loads, "_adapt", adapt)
    monkeypatch.setattr(loads, "load_stage", load_stage)
    monkeypatch.setattr(loads, "StageStreams", lambda epoch, *_: SimpleNamespace(epoch=epoch))
    anything: Any = SimpleNamespace(received_bytes=0)
    worker = Worker("a", anything, StageService("a"), Compute(), anything)
    await Loads(Session(worker, anything, Deadlines(), Counters(), send)).load(ORDER)
    assert answers == [Loaded(2, 1, 2, 3)] and freed == ["the kept stage"]

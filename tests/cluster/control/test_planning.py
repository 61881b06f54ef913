"""While plans are made and links measured, the coordinator's event loop serves; nothing that happens then is missed."""

from __future__ import annotations

import asyncio
from threading import Event
from types import SimpleNamespace
from typing import Any

import pytest

from llamaclust.cluster.control import planning
from llamaclust.cluster.control.planning import ClusterPlanner
from llamaclust.cluster.control.supervisor import Supervisor
from llamaclust.cluster.planner.links import UNKNOWN
from llamaclust.core.errors import ModelFileError
from llamaclust.wire.rpc import cache_flush
from llamaclust.wire.rpc.cache_flush import ColdCaches
from support.clusters.control_messages import REGISTER

NOTHING: Any = None


async def test_the_event_loop_serves_while_a_plan_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    served = Event()

    def plan(*_: object) -> bool:
        return served.wait(10.0)

    monkeypatch.setattr(planning, "plan_cluster", plan)
    config: Any = SimpleNamespace(plan=None)
    worker: Any = SimpleNamespace(registration=REGISTER)
    making = asyncio.create_task(
        ClusterPlanner(config, NOTHING, free_bytes=None, profiles={}, links=UNKNOWN).plan({"a": worker})
    )
    await asyncio.sleep(0.01)
    served.set()
    assert await making


async def test_others_have_turns_while_caches_are_swept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_flush, "_REST_S", 0)
    turns = 0

    async def serve() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    serving = asyncio.create_task(serve())
    await ColdCaches().sweep_in_turns()
    serving.cancel()
    assert turns >= 32


async def test_what_changes_while_a_plan_is_made_is_seen_to_before_all_is_settled() -> None:
    config: Any = SimpleNamespace(timeouts=SimpleNamespace(worker=5.0, load=60.0, recovery=120.0))
    registry: Any = SimpleNamespace(present={}, workers={})
    supervisor = Supervisor(config, NOTHING, NOTHING, registry, NOTHING, lambda event: None)
    settled: list[bool] = []  # as each plan is made

    async def improve(engine: object) -> bool:
        settled.append(supervisor._settled.is_set())
        if len(settled) == 1:
            supervisor._change()
        return True

    supervisor._improve = improve  # type: ignore[method-assign,assignment]
    keeping = asyncio.create_task(supervisor.keep(NOTHING))
    async with asyncio.timeout(5.0):
        await supervisor._settled.wait()
    keeping.cancel()
    assert settled == [False, False]


async def test_whoever_joins_while_a_load_fails_may_be_what_was_missing() -> None:
    """A start goes on, with that worker."""
    timeouts = SimpleNamespace(worker=5.0, load=60.0, recovery=120.0)
    config: Any = SimpleNamespace(timeouts=timeouts, workers=["a", "b"])
    registry: Any = SimpleNamespace(present={"a": object()}, workers={})
    epochs: Any = SimpleNamespace(file_is_away=False)
    supervisor = Supervisor(config, epochs, NOTHING, registry, NOTHING, lambda event: None)
    tries = 0

    async def plan() -> object:
        return SimpleNamespace(stages=())

    async def open_epoch(plan: object, *, alone: bool) -> str:
        nonlocal tries
        tries += 1
        if tries == 1:
            registry.present = {**registry.present, "b": object()}
            raise ModelFileError("no such file on this machine, and no other worker has it")
        return "opened"

    supervisor._plan = plan  # type: ignore[method-assign,assignment]
    supervisor._open = open_epoch  # type: ignore[method-assign,assignment]
    assert await supervisor._next_epoch() == "opened"


async def test_failures_that_go_on_for_hours_do_not_end_the_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    config: Any = SimpleNamespace(timeouts=SimpleNamespace(worker=5.0, load=60.0, recovery=120.0))
    supervisor = Supervisor(config, NOTHING, NOTHING, NOTHING, NOTHING, lambda event: None)
    pauses: list[float] = []

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)

    monkeypatch.setattr(asyncio, "sleep", sleep)
    for failures in (0, 1, 5000):
        await supervisor._hold_on(ModelFileError("too little of it is there"), failures)
    assert pauses == [0.1, 0.2, 5.0]

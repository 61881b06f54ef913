"""Tests that the coordinator's event loop serves while plans are made and links are measured."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from types import SimpleNamespace
from typing import Any

import pytest

from llamaclust.cluster.control import planning
from llamaclust.cluster.control.planning import ClusterPlanner
from llamaclust.wire.rpc import cache_flush
from llamaclust.wire.rpc.cache_flush import CacheFlush
from support.wire.control_messages import REGISTER

MODEL: Any = SimpleNamespace(model_id="m")


async def test_the_event_loop_serves_while_a_plan_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    served = Event()

    def plan(*_: object) -> bool:
        return served.wait(10.0)

    monkeypatch.setattr(planning, "plan_cluster", plan)
    config: Any = SimpleNamespace(plan=None)
    worker: Any = SimpleNamespace(registration=REGISTER, fresh_memory=None, measuring_bytes=0)
    unmeasured: Any = SimpleNamespace(of=lambda workers: {})
    making = asyncio.create_task(ClusterPlanner(config, MODEL, unmeasured).plan({"a": worker}))
    await asyncio.sleep(0.01)
    served.set()
    assert await making


async def test_a_plan_waits_for_no_other_work_in_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    is_over = Event()
    with ThreadPoolExecutor(1) as busy:
        loop = asyncio.get_running_loop()
        loop.set_default_executor(busy)
        blocked = loop.run_in_executor(None, is_over.wait, 60.0)
        monkeypatch.setattr(planning, "plan_cluster", lambda *_: "a plan")
        config: Any = SimpleNamespace(plan=None)
        worker: Any = SimpleNamespace(registration=REGISTER, fresh_memory=None, measuring_bytes=0)
        unmeasured: Any = SimpleNamespace(of=lambda workers: {})
        planner = ClusterPlanner(config, MODEL, unmeasured)
        try:
            async with asyncio.timeout(60):
                made: object = await planner.plan({"a": worker})
            assert made == "a plan" and not blocked.done()
        finally:
            is_over.set()
            await blocked


async def test_others_have_turns_while_caches_are_swept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_flush, "_REST_S", 0)
    turns = 0

    async def serve() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    serving = asyncio.create_task(serve())
    await CacheFlush().sweep_async()
    serving.cancel()
    assert turns >= 32

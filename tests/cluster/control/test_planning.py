"""Tests that the coordinator's event loop serves while plans are made and links are measured."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import pytest

from llamaclust.cluster.config.cluster_config import ClusterConfig
from llamaclust.cluster.control import planning
from llamaclust.cluster.control.planning import ClusterPlanner
from llamaclust.cluster.membership.worker_handle import WorkerHandle
from llamaclust.core.errors import UsageError
from llamaclust.core.gpus import Gpu
from llamaclust.model.loader import Model
from llamaclust.wire.rpc import cache_flush
from llamaclust.wire.rpc.cache_flush import CacheFlush
from llamaclust.wire.security.credentials import Insecure
from support.wire.control_messages import REGISTER

MODEL: Any = SimpleNamespace(model_id="m")
ANYTHING: Any = SimpleNamespace(send=None, of=lambda workers: {})
TINY = Path(__file__).parents[2] / "data/tiny/llama.gguf"


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


@pytest.mark.parametrize("device", ["CUDA1", "CPU"])
async def test_automatic_plans_leave_out_workers_that_cannot_obey_the_placement_rules(device: str) -> None:
    def registered(name: str, *gpus: str) -> WorkerHandle:
        devices = tuple(Gpu(gpu, "a GPU", 1 << 33, 1 << 33, f"{name} {gpu}") for gpu in gpus)
        return WorkerHandle(replace(REGISTER, name=name, gpus=devices), ANYTHING.send, lambda: "", Insecure())

    fit = ("cuda:0", "cuda:1") if device == "CUDA1" else ()
    workers = {"a": registered("a", "cuda:0"), "b": registered("b", *fit), "c": registered("c", "cuda:0")}
    rules = {"placement": [{"tensors": r"blk\.1\.", "device": device}]}
    given = {"model": str(TINY), "launcher": "static", "workers": 1, "context_length": 64, **rules}
    with Model.open(TINY) as model:
        planner = ClusterPlanner(ClusterConfig.model_validate(given), model, ANYTHING)
        for names, unfit in (("bc", "c"), ("b", ""), ("abc", "ac")):
            plan = await planner.plan({name: workers[name] for name in names})
            assert [stage.worker for stage in plan.stages] == ["b"] and "".join(planner.unfit) == unfit
            assert all(why.startswith("placement: ") and f"worker {name}" in why for name, why in planner.unfit.items())
        with pytest.raises(UsageError, match=r"\(worker c\)"):
            await planner.plan({name: workers[name] for name in "ac"})
        by_hand = {**given, "plan": [{"worker": "b", "layers": [0, 1]}, {"worker": "c", "layers": [1, 2]}]}
        planner.config = ClusterConfig.model_validate(by_hand)
        if device == "CUDA1":
            with pytest.raises(UsageError, match=r"\(worker c\)"):
                await planner.plan(workers)


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

"""Tests of a pool of workers: drains, admissions while the supervisor starts, and its end."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from llamaclust.cluster.control import observations
from llamaclust.cluster.control.cluster_state import PoolState
from llamaclust.cluster.control.memory_ledger import MemoryLedger
from llamaclust.cluster.control.observations import Observation, Suspect
from llamaclust.cluster.control.pool.drain import WorkerOperations
from llamaclust.cluster.control.reconcile import (
    Action,
    ClosePipeline,
    FailRequests,
    Interrupt,
    LoadEpoch,
    MakePlan,
    Notify,
    Serve,
    Wait,
    reconcile,
)
from llamaclust.cluster.control.supervisor import Supervisor
from llamaclust.cluster.membership.members import Members
from llamaclust.cluster.planner.plan import Plan
from llamaclust.cluster.state.control_record import ControlRecord
from llamaclust.cluster.state.events import Event, Notice
from llamaclust.core.errors import InsufficientMemoryError, WorkerError
from support.plans.observed_cluster import Cluster
from support.plans.worker_handles import plan_of, worker_handle
from support.several_models.runner import ANYTHING, new_store, supervised

UNPARTITIONED: Any = SimpleNamespace(pairs=frozenset())


async def test_closing_waits_for_the_action_and_for_the_end_of_lost_workers() -> None:
    (pool, supervisor), ended = supervised(Members(lambda *_: "")), list[str]()

    async def hang(what: str) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.05 if what == "action" else 0.01)
            ended.append(what)

    supervisor._action = asyncio.create_task(hang("action"))
    pool.ending.start(hang("ending"))
    await asyncio.sleep(0)
    async with asyncio.timeout(60):
        await supervisor.aclose()
        await pool.aclose()
    assert ended == ["action", "ending"]


async def test_a_worker_that_is_admitted_while_the_supervisor_starts_joins_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def no_loop(supervisor: Supervisor, *, is_start: bool) -> None: ...

    monkeypatch.setattr(Supervisor, "_loop", no_loop)
    registry = Members(lambda *_: "")
    (pool, supervisor), handle = supervised(registry), worker_handle("a")
    supervisor._runner.epoch = ANYTHING
    registry.admit(handle)
    pool.start()
    await supervisor.start()
    registry.announce(handle)  # when the worker has the answer to its registration
    joined = await supervisor.store.next(None)
    assert joined == observations.WorkerSeen("a", 1) and supervisor.store.is_current
    supervisor.store.apply(joined)
    assert supervisor.store.state.pool.present == {"a": 1}
    registry.mark_lost(handle, "it has registered again")
    registry.announce(handle)
    assert await supervisor.store.next(None) == observations.WorkerLost("a")
    assert supervisor.store.is_current, "a lost worker does not join"
    registry.admit(worker_handle("a"))
    assert registry.joins == {"a": 2}
    await supervisor.aclose()
    await pool.aclose()


async def test_a_drain_of_a_worker_without_layers_returns_although_requests_delay_a_better_plan() -> None:
    async def plan(*_: object, **__: object) -> Plan:
        return plan_of("a", "b")

    store, events = new_store(), list[Event]()
    workers = dict.fromkeys("abc", ANYTHING)
    epoch = SimpleNamespace(holds="ab".__contains__)
    planner, epochs = SimpleNamespace(plan=plan, ledger=MemoryLedger()), SimpleNamespace(model_id="m")
    served: Any = SimpleNamespace(planner=planner, epochs=epochs, epoch=epoch, store=store)
    registry: Any = SimpleNamespace(workers=workers, present=workers)
    joins = {"a": 1, "b": 2, "c": 3}
    store.state = replace(store.state, pool=PoolState(joins))
    store.apply(observations.Planned(store.state.inputs, plan_of("a", "b")))
    store.apply(observations.Signal.EPOCH_SERVING)
    pool = WorkerOperations(registry, ControlRecord(), [served], UNPARTITIONED, events.append)
    drains = {name: asyncio.create_task(pool.drain(name)) for name in "cb"}
    for _ in drains:
        observation = await store.next(None)
        assert observation is not None
        store.apply(observation)
    assert events == [Notice(f"worker {name} is drained: it gets no layers until `undrain`") for name in "cb"]
    await asyncio.sleep(0.01)
    assert not any(drain.done() for drain in drains.values()), "an older plan may give it layers"
    store.begin()
    store.apply(observations.Planned(store.state.inputs, plan_of("a")))
    await asyncio.sleep(0)
    assert not drains["c"].done(), "an action runs"
    store.apply(observations.Signal.ACTION_ENDED)
    async with asyncio.timeout(60):
        await drains["c"]
    assert not drains["b"].done(), "its layers are not moved yet"
    drains["b"].cancel()
    await asyncio.wait(drains.values())
    again = asyncio.create_task(pool.drain("c"))
    await asyncio.sleep(0)
    pool.undrain("c")
    again.cancel()
    assert events[2:] == [Notice("worker c is no longer drained: plans use it again")], "each change once"


async def test_a_drain_that_memory_does_not_suffice_for_after_all_is_taken_back() -> None:
    """The plan of the drain fits only into the memory that a worker had when it joined."""

    async def plan(*_: object, **__: object) -> Plan:
        return plan_of("a")

    store, events = new_store(), list[Event]()
    store.state = Cluster.serving().state
    epoch, workers = SimpleNamespace(holds="ab".__contains__), dict.fromkeys("ab", ANYTHING)
    planner, epochs = SimpleNamespace(plan=plan, ledger=MemoryLedger()), SimpleNamespace(model_id="m")
    served: Any = SimpleNamespace(planner=planner, epochs=epochs, epoch=epoch, store=store)
    registry: Any = SimpleNamespace(workers=workers, present=workers)
    pool = WorkerOperations(registry, ControlRecord(), [served], UNPARTITIONED, events.append)
    draining, short = asyncio.create_task(pool.drain("b")), InsufficientMemoryError("12 MiB are missing")
    plans = iter((plan_of("a"), None, plan_of("a", "b")))

    def outcome(action: Action | None) -> Observation | None:
        match action:
            case MakePlan(inputs):
                made = next(plans)
                return observations.Planned(inputs, made, None if made else short)
            case LoadEpoch(new, is_exclusive) if len(new.stages) == 1:
                return observations.EpochLoadFailed(short, is_exclusive, (Suspect("a", short),))
            case Interrupt(error):
                return observations.PipelineLost(error)
            case Notify(text):
                return observations.Noticed(text)
            case Wait(is_settled=True):
                store.settle()
            case Wait():
                return observations.Tick(store.state.tick.now_s + 1.0)
            case FailRequests(reason):
                pytest.fail(reason)
        simple: dict[type, Observation] = {
            LoadEpoch: observations.Signal.EPOCH_LOADED,
            Serve: observations.Signal.EPOCH_SERVING,
            ClosePipeline: observations.Signal.PIPELINE_CLOSED,
        }
        return simple.get(type(action))

    async with asyncio.timeout(60):
        while not draining.done():
            follows = outcome(reconcile(store.state)) if store.is_current else await store.next(None)
            if follows is not None:
                store.apply(follows)
            await asyncio.sleep(0)
    assert str(draining.exception()) == "the layers of worker b could not be moved: see the log"
    assert not pool.drained and store.state.loss is None
    assert store.state.serving is not None and len(store.state.serving.workers) == 2


async def test_a_drain_that_is_undrained_while_it_is_planned_does_not_take_place() -> None:
    """The undrain comes later, as from a client that has reconnected, and takes effect."""
    planning, planned = asyncio.Event(), asyncio.Event()

    async def plan(*_: object, **__: object) -> Plan:
        planning.set()
        await planned.wait()
        return plan_of("b")

    store, workers, events = new_store(), dict.fromkeys("ab", ANYTHING), list[Event]()
    planner, epochs = SimpleNamespace(plan=plan, ledger=MemoryLedger()), SimpleNamespace(model_id="m")
    served: Any = SimpleNamespace(planner=planner, epochs=epochs, store=store)
    registry: Any = SimpleNamespace(workers=workers, present=workers)
    pool = WorkerOperations(registry, ControlRecord(), [served], UNPARTITIONED, events.append)
    drain = asyncio.create_task(pool.drain("a"))
    await planning.wait()
    pool.undrain("a")
    planned.set()
    with pytest.raises(WorkerError, match="worker a was undrained before its layers moved"):
        async with asyncio.timeout(60):
            await drain
    assert await store.next(None) == observations.UndrainRequested("a") and store.is_current
    assert events == []

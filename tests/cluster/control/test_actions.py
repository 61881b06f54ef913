"""Tests of actions that fail, hang or are cancelled: a load fails or an action ends, and the supervisor continues."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from functools import partialmethod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llamaclust.cluster.config.cluster_config import ClusterConfig
from llamaclust.cluster.control import actions, epochs, observations
from llamaclust.cluster.control.actions import ActionRunner
from llamaclust.cluster.control.cluster_state import Expulsion, PipelineLoss, PoolState
from llamaclust.cluster.control.epochs import Epochs, EpochWorkers, StageLoadError
from llamaclust.cluster.control.memory_ledger import MemoryLedger
from llamaclust.cluster.control.observations import Observation, Suspect
from llamaclust.cluster.control.pool.drain import WorkerOperations
from llamaclust.cluster.control.pool.worker_pool import SupervisedWorkers, WorkerPool
from llamaclust.cluster.control.reconcile import (
    Action,
    ClosePipeline,
    Expel,
    FailRequests,
    Interrupt,
    LoadEpoch,
    MakePlan,
    Notify,
    Serve,
    Wait,
    reconcile,
)
from llamaclust.cluster.control.remote.pipeline import RemotePipeline
from llamaclust.cluster.control.serving import Serving
from llamaclust.cluster.control.state_store import StateStore
from llamaclust.cluster.control.supervisor import Supervisor
from llamaclust.cluster.engine.engine import Engine, EngineState
from llamaclust.cluster.membership.members import Members
from llamaclust.cluster.membership.worker_handle import WorkerHandle
from llamaclust.cluster.planner.links import UNKNOWN
from llamaclust.cluster.planner.plan import Plan, Prediction
from llamaclust.cluster.planner.planner import make_plan
from llamaclust.cluster.scheduler.requests import GenerationRequest
from llamaclust.cluster.scheduler.settings import SchedulerSettings
from llamaclust.cluster.state.control_record import ControlRecord
from llamaclust.cluster.state.events import Event, Notice
from llamaclust.core.errors import DeadlineError, InsufficientMemoryError, LlamaclustError, UsageError, WorkerError
from llamaclust.wire.control.messages import CoordinatorMessage, Failure, Load, Loaded, LoadFailed, Unload, UnloadFailed
from llamaclust.wire.control.weights import FindWeights, WeightsFound
from llamaclust.wire.security.credentials import Insecure
from support.clusters.fakes import VOCABULARY, FakePipeline, Losses
from support.clusters.served import until
from support.plans.observed_cluster import Cluster
from support.plans.plan_inputs import REQUEST, SMALL, worker
from support.several_models.runner import ANYTHING, action_runner, new_store
from support.wire.control_messages import LOAD, REGISTER

UNPARTITIONED: Any = SimpleNamespace(pairs=frozenset())


def plan_of(*names: str) -> Plan:
    return make_plan(SMALL, [worker(name) for name in names], replace(REQUEST, objective="throughput"))


def worker_handle(name: str, *, loads: bool = True, unload_failure: Failure | None = None) -> WorkerHandle:
    """Makes a worker whose loads succeed or fail; it answers an unload with a failure or not at all."""

    async def send(message: CoordinatorMessage) -> None:
        match message:
            case FindWeights(request_id=request_id):
                handle.receive(WeightsFound(True, request_id=request_id))
            case Load(epoch) if loads:
                handle.receive(Loaded(epoch, 1, 2, 3))
            case Load(epoch):
                handle.receive(LoadFailed(epoch, Failure("WorkerError", "its disk is bad")))
            case Unload(epoch) if unload_failure is not None:
                handle.receive(UnloadFailed(epoch, unload_failure))

    handle = WorkerHandle(replace(REGISTER, name=name), send, lambda: "", Insecure())
    return handle


async def test_an_unload_that_fails_raises_the_workers_own_error() -> None:
    handle = worker_handle("a", unload_failure=Failure("UsageError", "its memory is not free"))
    await handle.load(LOAD)
    with pytest.raises(UsageError, match="worker a: its memory is not free"):
        await handle.unload(LOAD.epoch, 30)


@pytest.mark.parametrize("fails", ["load", "connection"])
@pytest.mark.parametrize("unload_failure", [None, Failure("WorkerError", "no GPU")], ids=["no answer", "failure"])
async def test_a_load_whose_stages_cannot_be_unloaded_is_a_failed_load(
    fails: str, unload_failure: Failure | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def refused(*_: object) -> None:
        raise WorkerError("no connection")

    monkeypatch.setattr(WorkerHandle, "unload", partialmethod(WorkerHandle.unload, deadline_s=0.05))
    monkeypatch.setattr(epochs, "plan_limits", lambda *_: LOAD.limits)
    monkeypatch.setattr(RemotePipeline, "open", refused)
    workers = {
        "a": worker_handle("a", unload_failure=unload_failure),
        "b": worker_handle("b", loads=fails == "connection"),
    }
    model: Any = SimpleNamespace(
        plain=SimpleNamespace(path="/m.gguf", is_current=False),
        model_id="ab" * 32,
        adapters={},
        adapter_digests={},
        projector=None,
    )
    config: Any = SimpleNamespace(timeouts=SimpleNamespace(load=30.0))
    registry: Any = SimpleNamespace(workers=workers, present=workers)
    opened = Epochs(config, model, EpochWorkers(registry, ANYTHING, ControlRecord(term=2)), None)
    with pytest.raises(StageLoadError, match="its disk is bad" if fails == "load" else "no connection"):
        await opened.open(plan_of("a", "b"), UNKNOWN, is_exclusive=False)
    assert "layers of epoch 2.1 stay in memory: worker a" in caplog.text


@pytest.mark.parametrize("is_lost", [True, False])
async def test_the_pipeline_that_serves_is_predicted_again_with_each_plan(is_lost: bool) -> None:
    """The serving pipeline is not predicted while requests wait for another one."""
    former, new = plan_of("a", "b"), plan_of("a")

    async def plan(*_: object, **__: object) -> Plan:
        return new

    async def predict(plan: Plan, workers: object) -> Prediction | None:
        assert plan == former
        return new.prediction

    store = new_store()
    loss = PipelineLoss(0.0) if is_lost else None
    store.state = replace(store.state, serving=Serving(former, (("a", 1), ("b", 2))), loss=loss)
    runner = action_runner(store, ANYTHING)
    runner.planner = SimpleNamespace(plan=plan, predict=predict, ledger=MemoryLedger(), unfit={})  # type: ignore[assignment]
    await runner.run(MakePlan(store.state.inputs))
    planned = await store.next(None)
    assert planned == observations.Planned(store.state.inputs, new, served=None if is_lost else new.prediction)


async def test_rules_that_no_plan_obeys_end_no_pipeline_and_each_unfit_worker_is_named_once() -> None:
    async def plan(*_: object, **__: object) -> Plan:
        runner.planner.unfit = {"b": "placement: there is no cuda:1 (worker b)"}
        raise refused

    events, refused = list[Event](), UsageError("placement: there is no cuda:1 (worker a)")
    store = new_store()
    runner = action_runner(store, ANYTHING)
    runner._report = events.append
    runner.planner.plan = plan  # type: ignore[method-assign]
    named = []
    for joins in ({"a": 1, "b": 2}, {"a": 1, "b": 2, "c": 3}, {"a": 1, "b": 4}):
        store.state = replace(store.state, pool=PoolState(joins))
        await runner.run(MakePlan(store.state.inputs))
        planned = await store.next(None)
        assert planned == observations.Planned(store.state.inputs, error=refused)
        named.append(len(events))
    assert named == [1, 1, 2] and len({str(event) for event in events}) == 1
    assert events[0] == Notice("worker b gets no layers: placement: there is no cuda:1 (worker b)")


async def load_failure(runner: ActionRunner, store: StateStore, *, is_exclusive: bool) -> LlamaclustError:
    await runner.run(LoadEpoch(plan_of("a"), is_exclusive))
    observation = await store.next(None)
    assert isinstance(observation, observations.EpochLoadFailed)
    assert observation.is_exclusive is is_exclusive and observation.suspects == ()
    return observation.error


@pytest.mark.parametrize("is_exclusive", [True, False])
async def test_any_error_of_a_worker_is_a_failed_load(is_exclusive: bool) -> None:
    late = DeadlineError("worker a: unload of epoch 0.2 took longer than 60 s")

    async def open_epoch(*_: object, **__: object) -> None:
        raise late

    store = new_store()
    assert await load_failure(action_runner(store, open_epoch), store, is_exclusive=is_exclusive) is late


async def test_a_load_does_not_wait_for_ever_for_the_end_of_lost_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(actions, "_ENDING_S", 0.05)
    store = new_store()
    runner = action_runner(store, ANYTHING)
    ending = runner.ending.start(asyncio.sleep(60))
    async with asyncio.timeout(60):
        error = await load_failure(runner, store, is_exclusive=True)
    assert str(error) == "the end of lost workers' processes took longer than 0.05 s"
    assert not ending.done(), "a later load waits for it again"
    await runner.ending.close()


@pytest.mark.parametrize("stays", [True, False])
async def test_a_worker_that_stays_for_other_models_is_not_marked_as_lost(stays: bool) -> None:
    lost, events = list[str](), list[Event]()
    runner = action_runner(new_store(), ANYTHING)
    runner.planner.config = SimpleNamespace(model_name="m", models=("m",))  # type: ignore[assignment]
    runner._report = events.append
    registry = SimpleNamespace(
        workers={"b": "b"}, joins={"b": 2}, mark_lost=lambda name, why: lost.append(f"{name}: {why}")
    )
    runner._registry = registry  # type: ignore[assignment]
    await runner.run(Expel((Expulsion(("b", 2), "its disk is bad", stays, 10.0),)))
    notice = Notice("worker b is quarantined for 10 s unless model m needs it: its disk is bad")
    assert (lost, events) == (([], [notice]) if stays else (["b: its disk is bad"], []))
    assert await runner.store.next(None) is observations.Signal.WORKERS_EXPELLED


@pytest.mark.parametrize("is_lost", [False, True])
async def test_an_adapter_is_removed_when_no_microbatch_in_flight_uses_it(is_lost: bool) -> None:
    """An aborted request's blocks are in the prefix cache, so their microbatch needs the adapter on all stages."""
    changes = list[dict[int, str]]()

    async def change(model: Any) -> None:
        changes.append(model.adapter_digests)

    loaded = {0: "a", 1: "b"}
    settings = SchedulerSettings("m", VOCABULARY, 400, kv_blocks=100, max_sequences=8, max_waiting=4, adapters=loaded)
    pipeline, store = FakePipeline(settings.kv_blocks), new_store()
    store.state = replace(store.state, loss=None)
    async with Engine(pipeline, settings, owner=Losses()) as engine:
        runner = action_runner(store, ANYTHING)
        runner.engine, runner.planner.model = engine, SimpleNamespace(adapter_digests=loaded)  # type: ignore[assignment]
        runner.epochs.set_adapters = change  # type: ignore[method-assign]
        pipeline.gate.clear()
        stream = engine.submit(GenerationRequest("r", tuple(range(1, 71)), 5, seed=1, adapters=((0, 1.0),)))
        await until(lambda: bool(pipeline.microbatches))
        stream.abort()
        unused: Any = SimpleNamespace(adapter_digests={0: "a"})
        await runner.set_adapters(unused)
        removing = asyncio.create_task(runner.set_adapters(SimpleNamespace(adapter_digests={})))  # type: ignore[arg-type]
        for _ in range(10):
            await asyncio.sleep(0)
        assert changes == [{0: "a"}] and len(engine.scheduler.in_flight)
        if is_lost:
            pipeline.lose(WorkerError("it is lost"))
            await until(lambda: engine.state is EngineState.RECOVERING)
            for _ in range(10):
                await asyncio.sleep(0)
            assert changes == [{0: "a"}], "it waits for the recovery"
            engine.resume(FakePipeline(settings.kv_blocks), settings)
            store.settle()
        pipeline.gate.set()
        async with asyncio.timeout(60):
            await removing
        assert changes == [{0: "a"}, {}]


def supervised(registry: Members) -> tuple[WorkerPool, Supervisor]:
    async def nothing(_: object) -> None: ...

    config = ClusterConfig.model_validate({"model": "m.gguf", "workers": [{"name": "a"}], "state_dir": Path("/none")})
    opener: Any = SimpleNamespace(announce=nothing, model_id="m")
    launcher: Any = SimpleNamespace(end=nothing)
    workers: Any = SupervisedWorkers(registry, launcher, ControlRecord())  # type: ignore[arg-type]
    planner: Any = SimpleNamespace(profiles=SimpleNamespace(of=lambda workers: workers), config=config)
    pool = WorkerPool(config, workers, lambda event: None)
    return pool, Supervisor(config, opener, planner, pool, report=lambda event: None)


async def test_closing_waits_for_the_action_and_for_the_end_of_lost_workers() -> None:
    (pool, supervisor), ended = supervised(Members(lambda name: "")), list[str]()

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
    registry = Members(lambda name: "")
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

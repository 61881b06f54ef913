"""Tests of actions that fail, hang or are cancelled: a load fails or an action ends, and the supervisor continues."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from functools import partialmethod
from types import SimpleNamespace
from typing import Any

import pytest

from llamaclust.cluster.control import actions, epochs, observations
from llamaclust.cluster.control.actions import ActionRunner
from llamaclust.cluster.control.cluster_state import Expulsion, PipelineLoss, PoolState
from llamaclust.cluster.control.epochs import Epochs, EpochWorkers, StageLoadError
from llamaclust.cluster.control.memory_ledger import MemoryLedger
from llamaclust.cluster.control.reconcile import (
    Expel,
    LoadEpoch,
    MakePlan,
)
from llamaclust.cluster.control.remote.pipeline import RemotePipeline
from llamaclust.cluster.control.serving import Serving
from llamaclust.cluster.control.state_store import StateStore
from llamaclust.cluster.engine.engine import Engine, EngineState
from llamaclust.cluster.membership.worker_handle import WorkerHandle
from llamaclust.cluster.planner.links import UNKNOWN
from llamaclust.cluster.planner.plan import Plan, Prediction
from llamaclust.cluster.scheduler.requests import GenerationRequest
from llamaclust.cluster.scheduler.settings import SchedulerSettings
from llamaclust.cluster.state.control_record import ControlRecord
from llamaclust.cluster.state.events import Event, Notice
from llamaclust.core.errors import DeadlineError, LlamaclustError, LoadCancelledError, UsageError, WorkerError
from llamaclust.wire.control.messages import CoordinatorMessage, Failure, Load, LoadFailed
from llamaclust.wire.control.weights import FindWeights, WeightsFound
from support.clusters.fakes import VOCABULARY, FakePipeline, Losses
from support.clusters.served import until
from support.plans.worker_handles import plan_of, worker_handle
from support.several_models.runner import ANYTHING, action_runner, new_store
from support.wire.control_messages import LOAD
from support.wire.worker_handles import handle_of

UNPARTITIONED: Any = SimpleNamespace(pairs=frozenset())


async def test_an_unload_that_fails_raises_the_workers_own_error() -> None:
    handle = worker_handle("a", unload_failure=Failure("UsageError", "its memory is not free"))
    await handle.load(LOAD)
    with pytest.raises(UsageError, match="worker a: its memory is not free"):
        await handle.unload(LOAD.epoch, 30)


def epochs_of(workers: dict[str, WorkerHandle]) -> Epochs:
    model: Any = SimpleNamespace(
        plain=SimpleNamespace(path="/m.gguf", is_current=False),
        model_id="ab" * 32,
        adapters={},
        adapter_digests={},
        projector=None,
    )
    config: Any = SimpleNamespace(timeouts=SimpleNamespace(load=30.0))
    registry: Any = SimpleNamespace(workers=workers, present=workers)
    return Epochs(config, model, EpochWorkers(registry, ANYTHING, ControlRecord(term=2)), None)


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
    opened = epochs_of(workers)
    with pytest.raises(StageLoadError, match="its disk is bad" if fails == "load" else "no connection"):
        await opened.open(plan_of("a", "b"), UNKNOWN, is_exclusive=False, is_useless=lambda: False)
    assert "layers of epoch 2.1 stay in memory: worker a" in caplog.text


@pytest.mark.parametrize("is_exclusive", [True, False])
async def test_a_plan_that_a_drain_makes_useless_while_weights_are_searched_is_not_loaded(
    is_exclusive: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    received, searching, found = list[CoordinatorMessage](), asyncio.Event(), asyncio.Event()

    async def say(message: CoordinatorMessage) -> None:
        received.append(message)
        for handle in workers.values():
            match message:
                case FindWeights(request_id=request_id):
                    searching.set()
                    await found.wait()
                    handle.receive(WeightsFound(True, request_id=request_id))
                case Load(epoch):
                    handle.receive(LoadFailed(epoch, Failure("WorkerError", "its disk is bad")))

    monkeypatch.setattr(epochs, "plan_limits", lambda *_: LOAD.limits)
    workers, store = {name: handle_of(name, say) for name in "ab"}, new_store()
    store.state = replace(store.state, pool=PoolState({"a": 1, "b": 2}))
    store.apply(observations.Planned(store.state.inputs, plan_of("a", "b")))
    runner = action_runner(store, epochs_of(workers).open)
    loading = asyncio.create_task(runner.run(LoadEpoch(plan_of("a", "b"), is_exclusive)))
    async with asyncio.timeout(60):
        await searching.wait()
        store.apply(observations.DrainRequested("b"))
        found.set()
        await loading
        failed = await store.next(None)
    assert isinstance(failed, observations.EpochLoadFailed) and isinstance(failed.error, LoadCancelledError)
    assert all(isinstance(message, FindWeights) for message in received)


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

"""Tests of the memory ledger: memory that each of several models holds, and that plans of the others subtract."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from llamaclust.cluster.control import observations
from llamaclust.cluster.control.cluster_state import PipelineLoss
from llamaclust.cluster.control.memory_ledger import MemoryLedger, MemoryUse
from llamaclust.cluster.control.pool.drain import WorkerOperations
from llamaclust.cluster.control.reconcile import LoadEpoch, MakePlan, Serve
from llamaclust.cluster.membership.worker_handle import WorkerHandle
from llamaclust.cluster.membership.worker_requests import refresh_memory
from llamaclust.cluster.planner.plan import DevicePlan, Plan, StagePlan
from llamaclust.cluster.planner.planner import make_plan
from llamaclust.cluster.state.control_record import ControlRecord
from llamaclust.core.errors import InsufficientMemoryError
from llamaclust.core.gpus import Gpu
from llamaclust.core.sizes import MIB
from llamaclust.wire.control.messages import Heartbeat, Loaded
from llamaclust.wire.security.credentials import Insecure
from support.plans.plan_inputs import REQUEST, SMALL, worker
from support.several_models.runner import action_runner, new_store
from support.wire.control_messages import LOAD, REGISTER


def plan_of(*names: str) -> Plan:
    return make_plan(SMALL, [worker(name) for name in names], replace(REQUEST, objective="throughput"))


BOTH, ONLY_A, ONLY_B = plan_of("a", "b"), plan_of("a"), plan_of("b")


def use_of(*plans: Plan) -> MemoryUse:
    """Returns the memory of these plans as other models see it."""
    ledger = MemoryLedger()
    ledger.enter("a model", plans)
    return ledger.beside("another")


def epoch_of(plan: Plan) -> Any:
    async def close() -> None: ...

    return SimpleNamespace(plan=plan, pipeline=SimpleNamespace(close=close), settings=None)


async def test_a_move_that_a_loss_overtook_holds_the_memory_of_one_plan() -> None:
    async def open_epoch(*_: object, **__: object) -> Any:
        return epoch_of(BOTH)

    async def free_others(epoch: object) -> None: ...

    store = new_store()
    runner = action_runner(store, open_epoch)
    runner.epochs.free_others = free_others  # type: ignore[method-assign]
    runner.planner.config = SimpleNamespace(models=(), model_name="m")  # type: ignore[assignment]
    counts = SimpleNamespace(running=0, waiting=0)
    engine: Any = SimpleNamespace(counts=counts, resume=lambda *_: None)  # no retirement: the pipeline is lost
    runner.epoch, runner.engine, ledger = epoch_of(ONLY_A), engine, runner.planner.ledger
    await runner.run(LoadEpoch(BOTH, is_exclusive=False))
    assert ledger.beside("another") == use_of(ONLY_A, BOTH)
    store.state = replace(store.state, loss=PipelineLoss(asyncio.get_running_loop().time()))
    await runner.run(Serve())
    assert ledger.beside("another") == use_of(BOTH)
    assert [await store.next(None) for _ in range(2)] == [
        observations.Signal.EPOCH_LOADED,
        observations.Signal.EPOCH_SERVING,
    ]


@pytest.mark.parametrize("is_lost", [True, False], ids=["after a loss", "a move"])
async def test_a_plan_of_before_another_model_took_memory_is_not_loaded(is_lost: bool) -> None:
    """A plan that is in the ledger may be loaded, because the other model is planned beside it."""
    opened = []

    async def plan(*_: object, **__: object) -> Plan:
        return BOTH

    async def open_epoch(new: Plan, *_: object, **__: object) -> Any:
        opened.append(new)
        return epoch_of(new)

    store = new_store()
    runner, ledger = action_runner(store, open_epoch), MemoryLedger()
    planner: Any = SimpleNamespace(
        plan=plan, ledger=ledger, links=None, config=SimpleNamespace(models=(), model_name="m"), unfit={}
    )
    runner.planner = planner
    loss, store.state = store.state.loss, replace(store.state, loss=None)
    await runner.run(MakePlan(store.state.inputs))
    ledger.enter("another", (ONLY_A,))
    assert isinstance(await store.next(None), observations.Planned)
    await runner.run(LoadEpoch(BOTH, is_exclusive=is_lost))
    taken = await store.next(None)
    assert taken is observations.Signal.MEMORY_TAKEN and not opened
    before = store.state.inputs
    store.apply(taken)
    assert store.state.inputs != before, "another plan is due"
    assert ledger.beside("another") == MemoryUse()
    store.state = replace(store.state, loss=loss if is_lost else None)
    await runner.run(MakePlan(store.state.inputs))
    assert ledger.beside("another") == (use_of(BOTH) if is_lost else MemoryUse())
    if is_lost:
        ledger.enter("a third", (ONLY_B,))
    await runner.run(LoadEpoch(BOTH, is_exclusive=is_lost))
    assert opened == [BOTH]


async def test_a_drain_is_refused_where_the_others_suffice_for_each_model_but_not_for_all() -> None:
    ledger = MemoryLedger()
    old = make_plan(SMALL, [worker("b", 150), worker("c", 150)], REQUEST)
    assert len(old.stages) == 2

    def runner_of(model_id: str) -> Any:
        async def plan(workers: Mapping[str, object], _: object, beside: MemoryLedger = ledger, **__: object) -> Plan:
            held = beside.beside(model_id)
            return make_plan(SMALL, [worker(name, 420 - held[name, "cpu"] // MIB - 1) for name in workers], REQUEST)

        store = new_store()
        ledger.enter(model_id, (old,))
        planner, epochs = SimpleNamespace(plan=plan, ledger=ledger), SimpleNamespace(model_id=model_id)
        return SimpleNamespace(planner=planner, epochs=epochs, store=store)

    models, workers = [runner_of("m"), runner_of("n")], dict.fromkeys("bc")
    for model in models:
        assert await model.planner.plan({"c": None}, None), "each fits beside the other's old plan"
    before = ledger.beside("m"), ledger.beside("n")
    registry: Any = SimpleNamespace(workers=workers, present=workers)
    pairs: Any = SimpleNamespace(pairs=frozenset())
    operations = WorkerOperations(registry, ControlRecord(), models, pairs, lambda event: None)
    with pytest.raises(InsufficientMemoryError):
        async with asyncio.timeout(60):
            await operations.drain("b")
    assert not operations.drained and all(model.store.is_current for model in models)
    assert (ledger.beside("m"), ledger.beside("n")) == before


async def test_what_is_free_beside_stages_of_other_models_is_of_their_devices() -> None:
    """A plan subtracts other models' memory, which is therefore added to the free memory of the same device."""
    gpu = Gpu("cuda:0", "NVIDIA X", 1 << 34, 1 << 33)
    handle = WorkerHandle(replace(REGISTER, device="cuda:0", gpus=(gpu,)), nothing, lambda: "", Insecure())
    figures = {"touched_bytes": 0, "kv_bytes": 0, "workspace_bytes": 0, "memory_bytes": None}
    parts = [
        DevicePlan(device="cpu", start=0, end=2, weight_bytes=5, **figures),  # type: ignore[arg-type]
        DevicePlan(device="cuda:0", start=2, end=4, weight_bytes=70, **figures),  # type: ignore[arg-type]
    ]
    stage = StagePlan(worker="a", start=0, end=4, weight_bytes=75, devices=tuple(parts), **figures)  # type: ignore[arg-type]
    ledger = MemoryLedger()
    ledger.enter("another", (replace(BOTH, stages=(stage,)),))
    order = replace(LOAD, model_id="another", start=0, end=4, devices=stage.device_layers)
    for is_loaded in (False, True):
        if is_loaded:
            handle.stages[1] = (order, Loaded(1, 75, 0, 0))
        refreshing = asyncio.create_task(refresh_memory(handle, ledger.loaded(handle)))
        await asyncio.sleep(0)
        handle.receive(Heartbeat(0.0, 0, 0, 1, 1000, gpu_free_bytes=(3000,)))
        await refreshing
        assert handle.fresh_memory is not None
        free = handle.fresh_memory.free_bytes, handle.fresh_memory.gpus[0].free_bytes
        assert free == ((1005, 3070) if is_loaded else (1000, 3000)), "a plan that is not loaded takes nothing yet"


async def nothing(_: object) -> None: ...

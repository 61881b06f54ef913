"""Checks that no request waits for a sleeping model when models sleep at any moment, with a fake engine and workers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from random import Random
from typing import Any

import pytest

from llamaclust.cluster.control import model_lifecycle, observations
from llamaclust.cluster.control.model_lifecycle import ModelLifecycle, ModelRotation
from llamaclust.cluster.control.observations import Signal
from llamaclust.cluster.control.reconcile import Action, LoadEpoch, MakePlan, Serve, Wait, reconcile
from llamaclust.cluster.engine.engine import EngineState
from llamaclust.cluster.engine.request_stream import OpenRequests
from llamaclust.core.errors import InsufficientMemoryError, WorkerError
from support.plans.observed_cluster import BOTH
from support.seed import SEED
from support.several_models.runner import ANYTHING, action_runner, new_store

_PLACES = 2  # places for loaded models
_WAKE = 30  # iterations of the event loop after which a request has marked its model as wanted


class Engine:
    def __init__(self) -> None:
        self.requests = OpenRequests(ANYTHING, ANYTHING)
        self.state = EngineState.ASLEEP
        self.error: WorkerError | None = None

    async def finish_tile(self) -> None: ...

    def sleep(self, *, is_forced: bool) -> bool:
        if not (is_forced or self.requests.are_empty):
            return False
        self.state = EngineState.ASLEEP
        return True


class Model:
    """A model that plans, loads and frees for a random number of event loop iterations; it loads once `may_load` is
    set, and frees once `may_free` is set."""

    def __init__(self, name: str, source: Random, loaded: set[str]) -> None:
        self.name, self.source, self.loaded = name, source, loaded
        self.frees, self.may_free = asyncio.Event(), asyncio.Event()
        self.may_load = asyncio.Event()
        self.may_free.set()
        self.may_load.set()
        engine: Any = Engine()
        self.engine = engine
        self.store = new_store()
        for number, worker in enumerate("ab", 1):
            self.store.apply(observations.WorkerSeen(worker, number))
        self.store.state = replace(self.store.state, is_start=False, is_wanted=False, is_unloaded=True, is_alone=False)
        self.runner = action_runner(self.store, ANYTHING)
        self.runner.engine = self.engine
        epochs: Any = self.runner.epochs
        epochs.free_others = self.free
        self.lifecycle = ModelLifecycle(name, self.store, self.engine, None)

    @property
    def is_awake(self) -> bool:
        return self.engine.state is EngineState.READY

    async def pause(self) -> None:
        await _iterations(self.source.choice((0, 1, 5, 30)))

    async def free(self, _: object) -> None:
        self.frees.set()
        await self.pause()
        await self.may_free.wait()
        self.loaded.discard(self.name)

    async def act(self, action: Action) -> None:
        await self.pause()
        is_full = len(self.loaded - {self.name}) >= _PLACES
        match action:
            case MakePlan(inputs):
                plan, error = (None, InsufficientMemoryError("full")) if is_full else (BOTH, None)
                self.store.post(observations.Planned(inputs, plan, error, is_beside=True))
            case LoadEpoch() if is_full:
                self.store.post(Signal.MEMORY_TAKEN)
            case LoadEpoch():
                self.loaded.add(self.name)
                await self.pause()
                await self.may_load.wait()
                self.store.post(Signal.EPOCH_LOADED)
            case Serve():
                self.engine.state = EngineState.READY
                self.store.post(Signal.EPOCH_SERVING)
            case _:
                await self.runner.run(action)
        self.store.post(Signal.ACTION_ENDED)

    async def supervise(self) -> None:
        while True:
            self.store.apply(observations.Tick(asyncio.get_running_loop().time()))
            action = reconcile(self.store.state)
            if action is not None and not isinstance(action, Wait):
                self.store.begin()
                acting = asyncio.create_task(self.act(action))
                acting.add_done_callback(lambda ended: ended.result())
            observation = await self.store.next(None)
            assert observation is not None
            self.store.apply(observation)

    async def watch(self) -> None:
        count = 0
        while count < _WAKE:
            lifecycle = self.lifecycle
            count = count + 1 if lifecycle.is_asleep and not (lifecycle.is_idle or lifecycle.is_preempted) else 0
            await asyncio.sleep(0)
        raise AssertionError(f"model {self.name} sleeps although requests wait for it")


async def _iterations(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


@asynccontextmanager
async def _models(names: str, source: Random) -> AsyncIterator[Sequence[Model]]:
    loaded = set[str]()
    models = [Model(name, source, loaded) for name in names]
    async with asyncio.timeout(60), ModelRotation({model.name: model.lifecycle for model in models}):
        supervising = [asyncio.create_task(model.supervise()) for model in models]
        yield models
        for task in supervising:
            task.cancel()


async def _until_awake(model: Model) -> None:
    await model.store.until(lambda state: state.loss is None)


@pytest.mark.parametrize("signal", [Signal.SLEEP_REQUESTED, Signal.TURN_ENDED])
async def test_a_request_and_an_unload_that_come_while_the_stages_are_freed(signal: Signal) -> None:
    async with _models("a", Random(SEED)) as (model,):
        model.lifecycle.load()
        await _until_awake(model)
        model.may_free.clear()
        model.store.post(signal)
        await model.frees.wait()
        with model.engine.requests.announced():
            await model.store.until(lambda state: state.is_wanted)
            unloading = asyncio.create_task(model.lifecycle.sleep())
            await model.store.until(lambda state: not state.is_wanted)
            model.may_free.set()
            await _iterations(_WAKE)
            assert not model.lifecycle.is_asleep
            await _until_awake(model)
        await unloading


async def test_a_request_that_comes_in_the_moment_in_which_another_ends() -> None:
    async with _models("a", Random(SEED)) as (model,):
        model.lifecycle.is_preempted = True
        with model.engine.requests.announced():
            await _iterations(_WAKE)
            assert model.lifecycle.is_asleep
        model.lifecycle.resume()
        with model.engine.requests.announced():
            await _iterations(_WAKE)
            assert not model.lifecycle.is_asleep


async def test_a_request_that_reaches_the_engine_after_the_requests_failed_and_the_model_slept() -> None:
    async with _models("a", Random(SEED)) as (model,):
        model.lifecycle.enter()
        await _until_awake(model)
        model.store.post(Signal.SLEEP_REQUESTED)
        await model.store.until(lambda state: state.is_asleep)
        with model.engine.requests.announced():
            await _iterations(_WAKE)
            assert not model.lifecycle.is_asleep
        model.lifecycle.leave()


async def test_the_idle_time_begins_when_the_model_serves() -> None:
    async with _models("a", Random(SEED)) as (model,):
        model.lifecycle.usual_s = 0.01
        model.may_load.clear()
        await _iterations(_WAKE)
        model.lifecycle.load()
        await asyncio.sleep(0.05)
        model.may_load.set()
        await _until_awake(model)
        assert model.store.state.is_wanted
        await model.store.until(lambda state: state.is_asleep)


async def test_a_preload_puts_the_longest_idle_model_to_sleep_and_waits_for_the_load() -> None:
    async with _models("abc", Random(SEED)) as (first, second, third):
        for model in (first, second):
            model.lifecycle.load()
            await _until_awake(model)
            await _iterations(_WAKE)
        third.may_load.clear()
        preloading = asyncio.create_task(third.lifecycle.preload())
        await third.store.until(lambda state: state.planning is not None and state.planning.plan is not None)
        await _iterations(_WAKE)
        assert first.lifecycle.is_asleep and not preloading.done()
        third.may_load.set()
        await preloading
        assert third.is_awake and third.lifecycle.is_idle and second.is_awake


async def test_a_preload_reports_a_failed_load() -> None:
    async with _models("a", Random(SEED)) as (model,):
        model.may_load.clear()
        preloading = asyncio.create_task(model.lifecycle.preload())
        await model.store.until(lambda state: state.is_planned)
        model.engine.state, model.engine.error = EngineState.REFUSING, WorkerError("the file is absent")
        model.store.post(observations.RequestsFailed("the file is absent"))
        with pytest.raises(WorkerError, match="the file is absent"):
            await preloading
        assert model.lifecycle.is_idle


async def test_a_recovery_is_no_use_of_a_model() -> None:
    async with _models("a", Random(SEED)) as (model,):
        await _iterations(_WAKE)
        model.lifecycle.load()
        await _until_awake(model)
        await model.store.until(lambda state: state.loss is None)
        await _iterations(_WAKE)
        before_s = model.lifecycle.idle_since_s
        model.store.post(observations.PipelineLost(WorkerError("a worker is lost")))
        model.store.post(Signal.PIPELINE_CLOSED)
        await model.store.until(lambda state: state.loss is not None)
        await model.store.until(lambda state: state.loss is None)
        await _iterations(_WAKE)
        assert model.lifecycle.serving_since_s is not None and model.lifecycle.idle_since_s == before_s


async def test_requests_and_unloads_at_random(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some requests end early, because their clients disconnect."""
    monkeypatch.setattr(model_lifecycle, "_TURN_S", 0.0)
    monkeypatch.setattr(model_lifecycle, "_LOOK_S", 0.0)
    source = Random(SEED)
    async with _models("abcd", source) as models:

        async def request() -> None:
            for _ in range(150):
                model, patience = source.choice(models), source.choice((0, 1, 5, 50, None))
                with model.engine.requests.announced():
                    while not model.is_awake and patience != 0:
                        patience = None if patience is None else patience - 1
                        await asyncio.sleep(0)
                    await model.pause()
                await model.pause()

        async def load_and_unload() -> None:
            while True:
                await _iterations(source.randrange(30))
                lifecycle = source.choice(models).lifecycle
                if source.randrange(3):
                    await lifecycle.sleep()
                else:
                    lifecycle.load()

        works = [*(model.watch() for model in models), *(load_and_unload() for _ in range(4))]
        tasks = [asyncio.create_task(work) for work in works]
        requests = [asyncio.create_task(request()) for _ in range(12)]
        answered = asyncio.ensure_future(asyncio.wait(requests))
        done, _ = await asyncio.wait([answered, *tasks], return_when=asyncio.FIRST_COMPLETED)
        for task in (*tasks, *requests):
            task.cancel()
        for each in done:
            each.result()

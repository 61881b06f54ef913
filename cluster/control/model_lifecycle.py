"""Decides which models are awake (loaded). Models that do not fit into memory together take turns."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from llamaclust.cluster.control.observations import Signal
from llamaclust.cluster.control.state_store import StateStore
from llamaclust.cluster.engine.engine import Engine, EngineState
from llamaclust.core.errors import WorkerError
from llamaclust.wire.rpc.task_set import TaskSet

_LOOK_S = 1.0
_TURN_S = 30.0
"""Minimum seconds that a model stays loaded before another model with requests may take its memory."""
_MOST_TURNS = 16
"""Maximum factor on `_TURN_S`. The factor doubles each time that a turn leaves the same requests unfinished."""


def _now_s() -> float:
    return asyncio.get_running_loop().time()


@dataclass(eq=False, slots=True)
class ModelLifecycle:
    """A model that is awake (loaded) or asleep. Falls asleep after `usual_s` seconds without requests (None: never)."""

    name: str
    store: StateStore
    engine: Engine
    usual_s: float | None
    keep_alive_s: float | None = field(init=False)  # Seconds that the model stays awake after its last request.
    idle_since_s: float = field(default_factory=_now_s)
    serving_since_s: float | None = None
    is_preempted: bool = False  # True if requests do not wake the model, because another model has its turn.
    turns: int = 1  # Length of the next turn, in units of `_TURN_S`.
    is_explicit: bool = False  # True while a command loads the model. It then stays awake without requests.
    _interrupted: frozenset[int] = frozenset()  # Keys of the requests that were unfinished when the last turn ended.
    _users: int = 0
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.keep_alive_s = self.usual_s

    @property
    def is_asleep(self) -> bool:
        return self.store.state.is_asleep

    @property
    def is_loading(self) -> bool:
        return not self.is_asleep and self.store.state.loss is not None

    @property
    def is_idle(self) -> bool:
        return not self._users and self.engine.requests.are_empty

    @property
    def is_leaving(self) -> bool:
        """True if the model will sleep soon, because its idle time is over or another model needs its memory."""
        return not self.store.state.is_wanted or (self.is_idle and self.expires_in_s == 0)

    @property
    def expires_in_s(self) -> float | None:
        if self.keep_alive_s is None or self.is_asleep or self.engine.state is EngineState.DOWN:
            return None
        # The model has no idle time while it is loaded for requests, but it has while it recovers.
        loss = self.store.state.loss
        idle_s = 0.0 if loss is not None and loss.error is None else _now_s() - self.idle_since_s
        return max(0.0, self.keep_alive_s - idle_s)

    @property
    def _refuses(self) -> bool:
        return self.engine.state in (EngineState.REFUSING, EngineState.DOWN)

    def enter(self) -> None:
        """Counts a request that has not reached the engine yet, and wakes the model."""
        self._users += 1
        self.wake()

    def leave(self) -> None:
        self._users -= 1
        self.idle_since_s = _now_s()
        self._changed.set()

    def keep(self, seconds: float | None) -> None:
        """Sets the seconds that the model stays awake without requests. The next request restores `usual_s`."""
        self.keep_alive_s = seconds
        self._changed.set()

    def wake(self) -> None:
        self.idle_since_s = _now_s()
        self.keep_alive_s = self.usual_s
        self._changed.set()
        self._stay_awake()

    def _stay_awake(self) -> None:
        # The signal is posted even if the model is awake, because it may just be going to sleep for another model.
        if not self.is_preempted:
            self.store.post(Signal.WAKE_REQUESTED)

    def begin_serving(self, *, is_recovery: bool) -> None:
        self.serving_since_s, self.is_explicit = _now_s(), False
        if self.is_idle:
            if not is_recovery:
                self.idle_since_s = self.serving_since_s
            self._changed.set()

    def load(self) -> None:
        self.is_explicit = self.serving_since_s is None
        self.wake()

    async def preload(self) -> None:
        """Loads the model as a request does, and waits until it is loaded. Raises WorkerError if loading failed."""
        self.enter()
        try:
            await self.store.until(lambda state: state.loss is None or self._refuses)
            if self._refuses:
                raise WorkerError(str(self.engine.error))
        finally:
            self.leave()

    async def sleep(self) -> None:
        """Puts the model to sleep if it has no requests."""
        if self._users:
            return
        self.is_explicit = False
        self.store.post(Signal.SLEEP_REQUESTED)
        await self.store.until(lambda state: not state.is_wanted)
        await self.store.until(lambda state: state.is_asleep or state.is_wanted)

    async def preempt(self) -> None:
        """Unloads the model although it has requests. They are computed again when the model is loaded again."""
        found = frozenset(self.engine.requests.keys)
        self.turns = min(2 * self.turns, _MOST_TURNS) if found & self._interrupted else 1
        self._interrupted, self.is_preempted = found, True
        await self.engine.finish_tile()
        self.store.post(Signal.TURN_ENDED)
        await self.store.until(lambda state: not state.is_wanted)
        await self.store.until(lambda state: state.is_asleep or state.is_wanted)

    def resume(self) -> None:
        self.is_preempted = False
        if not self.is_idle:
            self._stay_awake()

    async def requested(self) -> None:
        while self.is_idle:
            await self._changes(self.engine.requests.wait_any(), self.expires_in_s)
            if self.is_idle and self.expires_in_s == 0:
                await self.sleep()

    async def idle(self) -> None:
        requests = self.engine.requests
        while not self.is_idle:
            await self._changes(requests.wait_any() if requests.are_empty else requests.wait_empty())
            if not self.is_idle:  # The model had no requests for a short time, and may have been put to sleep.
                self._stay_awake()
        self.idle_since_s = _now_s()

    async def _changes(self, waiting: Coroutine[Any, Any, Any], timeout_s: float | None = None) -> None:
        self._changed.clear()
        waits = [asyncio.create_task(waiting), asyncio.create_task(self._changed.wait())]
        try:
            await asyncio.wait(waits, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()


class ModelRotation:
    """Decides which models of a cluster are awake, while this context manager is open."""

    def __init__(self, lifecycles: Mapping[str, ModelLifecycle]) -> None:
        self.lifecycles = lifecycles  # Models by name.
        # This event is set, and replaced by a new one, when a model has no requests any longer.
        self._idle = asyncio.Event()
        self._tasks = TaskSet()

    async def __aenter__(self) -> ModelRotation:
        for lifecycle in self.lifecycles.values():
            self._tasks.start(self._follow(lifecycle))
            self._tasks.start(self._make_room(lifecycle))
            self._tasks.start(self._time(lifecycle))
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._tasks.close()

    async def _follow(self, lifecycle: ModelLifecycle) -> None:
        while True:
            await lifecycle.requested()
            lifecycle.wake()
            await lifecycle.idle()
            if lifecycle.engine.state is EngineState.REFUSING:  # The next request tries to load the model again.
                await lifecycle.sleep()
            self._idle.set()
            self._idle = asyncio.Event()

    async def _make_room(self, lifecycle: ModelLifecycle) -> None:
        """Puts other models to sleep while `lifecycle` lacks memory. Models without requests go first."""
        while True:
            await lifecycle.store.until(lambda state: state.lacks_memory)
            preempted: list[ModelLifecycle] = []
            try:
                await self._free(lifecycle, preempted)
            finally:
                for other in preempted:
                    other.resume()

    async def _free(self, lifecycle: ModelLifecycle, preempted: list[ModelLifecycle]) -> None:
        while lifecycle.store.state.lacks_memory:
            idle = self._idle
            if (sleeper := self._longest_idle(lifecycle)) is not None:
                await sleeper.sleep()
            elif (sleeper := self._longest_serving(lifecycle)) is not None:
                preempted.append(sleeper)
                await sleeper.preempt()
            else:  # Memory may also become free when another model moves its layers.
                with suppress(TimeoutError):
                    async with asyncio.timeout(_LOOK_S):
                        await idle.wait()
            await _plan_again(lifecycle.store)

    async def _time(self, lifecycle: ModelLifecycle) -> None:
        is_recovery = False
        while True:
            await lifecycle.store.until(lambda state: state.loss is None)
            lifecycle.begin_serving(is_recovery=is_recovery)
            await lifecycle.store.until(lambda state: state.loss is not None)
            lifecycle.serving_since_s = None
            loss = lifecycle.store.state.loss
            is_recovery = loss is not None and loss.error is not None

    def _longest_serving(self, lifecycle: ModelLifecycle) -> ModelLifecycle | None:
        waiting = lifecycle.store.state.loss
        if lifecycle.is_idle or waiting is None:
            return None
        others = (other for other in self.lifecycles.values() if other is not lifecycle and not other.is_preempted)
        serving = ((other.serving_since_s, other) for other in others if other.serving_since_s is not None)
        since_s, found = min(serving, key=lambda each: each[0], default=(0.0, None))
        is_over = found is not None and max(since_s, waiting.since_s) + found.turns * _TURN_S <= _now_s()
        return found if is_over else None

    def _longest_idle(self, lifecycle: ModelLifecycle) -> ModelLifecycle | None:
        if lifecycle.is_idle and not lifecycle.is_explicit:
            return lifecycle
        others = (other for other in self.lifecycles.values() if other is not lifecycle)
        idle = (other for other in others if other.is_idle and not other.is_asleep)
        return min(idle, key=lambda other: other.idle_since_s, default=None)


async def _plan_again(store: StateStore) -> None:
    """Requests a plan for the memory that is free now. Returns when the plan is made or is no longer needed."""
    before = store.state.pool.memory
    store.post(Signal.MEMORY_FREED)
    await store.until(
        lambda state: state.pool.memory > before and (state.is_planned or state.loss is None or not state.is_wanted)
    )

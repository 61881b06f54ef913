"""Which models are awake: a request wakes one; one without requests sleeps after a time, or when another one needs its
memory."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from llamaclust.cluster.control.observations import Signal
from llamaclust.cluster.control.observed import Observed
from llamaclust.cluster.engine.engine import Engine, EngineState
from llamaclust.wire.rpc.task_set import TaskSet

_LOOK_S = 1.0
"""Between two looks for a model without requests, if none reports that it has none any more."""


def _now_s() -> float:
    return asyncio.get_running_loop().time()


@dataclass(eq=False, slots=True)
class Resident:
    """One model. `usual_s`: how long it stays awake without requests; None: until its memory is needed."""

    name: str
    observed: Observed
    engine: Engine
    usual_s: float | None
    keep_alive_s: float | None = field(init=False)  # likewise after its last request
    idle_since_s: float = field(default_factory=_now_s)
    _users: int = 0
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.keep_alive_s = self.usual_s

    @property
    def is_asleep(self) -> bool:
        return self.observed.state.is_asleep

    @property
    def is_loading(self) -> bool:
        return not self.is_asleep and self.observed.state.loss is not None

    @property
    def is_idle(self) -> bool:
        return not self._users and self.engine.requests.are_empty

    @property
    def expires_in_s(self) -> float | None:
        """Until it is to sleep, if no request comes; None: not at any time."""
        if self.keep_alive_s is None or self.is_asleep:
            return None
        return max(0.0, self.idle_since_s + self.keep_alive_s - _now_s())

    def enter(self) -> None:
        """A request has come that may have nothing for the engine yet: the model is loaded."""
        self._users += 1
        self.wake()

    def leave(self) -> None:
        """The request that entered has its reply."""
        self._users -= 1
        self.idle_since_s = _now_s()
        self._changed.set()

    def keep(self, seconds: float | None) -> None:
        """Until the next request, in place of its usual time."""
        self.keep_alive_s = seconds
        self._changed.set()

    def wake(self) -> None:
        """It is loaded, and its time begins again."""
        self.idle_since_s = _now_s()
        self.keep_alive_s = self.usual_s
        self._changed.set()
        if not self.observed.state.is_wanted:
            self.observed.post(Signal.WAKE_REQUESTED)

    async def sleep(self) -> None:
        """Returns when it sleeps, or is awake for a request that came meanwhile."""
        self.observed.post(Signal.SLEEP_REQUESTED)
        await self.observed.until(lambda state: not state.is_wanted)
        await self.observed.until(lambda state: state.is_asleep or state.is_wanted)

    async def requested(self) -> None:
        """Returns when there is a request. Until then it sleeps once its time has passed."""
        while self.is_idle:
            if not await self._changes(self.engine.requests.wait_any(), self.expires_in_s) and self.is_idle:
                await self.sleep()

    async def idle(self) -> None:
        """Returns when there is no request."""
        while not self.is_idle:
            await self._changes(self.engine.requests.wait_empty() if not self._users else asyncio.Event().wait())
        self.idle_since_s = _now_s()

    async def _changes(self, waiting: Coroutine[Any, Any, Any], timeout_s: float | None = None) -> bool:
        """Waits for this or a change, but no longer; whether it came."""
        self._changed.clear()
        waits = [asyncio.create_task(waiting), asyncio.create_task(self._changed.wait())]
        try:
            done, _ = await asyncio.wait(waits, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        return bool(done)


class Residency:
    """Of all models of a cluster. A context manager: decides while it is entered."""

    def __init__(self, residents: Mapping[str, Resident]) -> None:
        self.residents = residents  # by name
        self._idle = asyncio.Event()  # replaced when a model has no requests any more
        self._tasks = TaskSet()

    async def __aenter__(self) -> Residency:
        for resident in self.residents.values():
            self._tasks.start(self._follow(resident))
            self._tasks.start(self._make_room(resident))
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._tasks.close()

    async def _follow(self, resident: Resident) -> None:
        while True:
            await resident.requested()
            resident.wake()
            await resident.idle()
            if resident.engine.state is EngineState.REFUSING:  # the next request tries again
                await resident.sleep()
            self._idle.set()
            self._idle = asyncio.Event()

    async def _make_room(self, resident: Resident) -> None:
        """Models without requests sleep for it, the longest idle one first, while its plan lacks memory."""
        observed = resident.observed
        while True:
            await observed.until(lambda state: state.lacks_memory)
            idle, sleeper = self._idle, self._longest_idle(resident)
            if sleeper is None:
                with suppress(TimeoutError):
                    async with asyncio.timeout(_LOOK_S):
                        await idle.wait()
            else:
                await sleeper.sleep()
                observed.post(Signal.MEMORY_FREED)
                await observed.until(lambda state: not state.lacks_memory)

    def _longest_idle(self, resident: Resident) -> Resident | None:
        """Of those that are awake: itself, where it was lost and no request waits for it."""
        loss = resident.observed.state.loss
        if resident.is_idle and loss is not None and loss.error is not None:
            return resident
        others = (other for other in self.residents.values() if other is not resident)
        idle = (other for other in others if other.is_idle and not other.is_asleep)
        return min(idle, key=lambda other: other.idle_since_s, default=None)

"""Owns the queue of observations, and the state that results from them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

from llamaclust.cluster.control.cluster_state import ClusterState
from llamaclust.cluster.control.observations import Observation
from llamaclust.cluster.control.state_changes import observe


class StateStore:
    """The supervisor's state and its queue of observations. `settled` is set while the supervisor has nothing to do."""

    def __init__(self, state: ClusterState) -> None:
        self.state = state
        self.settled = asyncio.Event()
        self._waiting: dict[asyncio.Future[None], Callable[[ClusterState], bool]] = {}
        self._queue: asyncio.Queue[Observation] = asyncio.Queue()

    @property
    def is_current(self) -> bool:
        return self._queue.empty()

    def post(self, observation: Observation) -> None:
        self.settled.clear()
        self._queue.put_nowait(observation)

    def apply(self, observation: Observation) -> None:
        self.state = observe(self.state, observation)
        self.notify()

    def settle(self) -> None:
        self.settled.set()
        self.notify()

    async def settled_or(self, is_enough: Callable[[ClusterState], bool]) -> None:
        await self.until(lambda state: self.settled.is_set() or is_enough(state))

    async def until(self, is_enough: Callable[[ClusterState], bool]) -> None:
        reached = asyncio.get_running_loop().create_future()
        self._waiting[reached] = is_enough
        self.notify()
        try:
            await reached
        finally:
            del self._waiting[reached]

    def notify(self) -> None:
        for reached, is_enough in self._waiting.items():
            if not reached.done() and is_enough(self.state):
                reached.set_result(None)

    def begin(self) -> None:
        self.state = replace(self.state, is_acting=True)

    async def next(self, until_s: float | None) -> Observation | None:
        """Returns the next observation, or None if none has come when the event loop's clock reaches `until_s`."""
        if not self._queue.empty():
            return self._queue.get_nowait()
        with suppress(TimeoutError):
            async with asyncio.timeout_at(until_s):
                return await self._queue.get()
        return None

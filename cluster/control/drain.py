"""What operators ask of workers: to hold no layers, to hold some again, what their logs say last."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping

from llamaclust.cluster.membership.registry import Registry
from llamaclust.cluster.membership.worker_handle import WorkerHandle
from llamaclust.core.errors import UsageError, WorkerError
from llamaclust.wire.control.messages import LogTail


class Workforce:
    """Somebody else moves layers: it hears of each change, and asks who is `usable`."""

    def __init__(
        self,
        registry: Registry,
        can_do: Callable[[Mapping[str, WorkerHandle]], Awaitable[object]],
        holds: Callable[[str], bool],
        change: Callable[[], None],
        settled: asyncio.Event,
    ) -> None:
        """`can_do` raises where these workers alone are not enough. `holds`: whether a worker has layers of what
        serves. `settled` is set when since the last `change` all has been done that can be."""
        self.spared: set[str] = set()  # names of workers that are to hold no layers
        self._registry = registry
        self._can_do = can_do
        self._holds = holds
        self._change = change
        self._settled = settled

    @property
    def usable(self) -> dict[str, WorkerHandle]:
        """Those who are here and may hold layers."""
        return {name: worker for name, worker in self._registry.present.items() if name not in self.spared}

    async def spare(self, name: str) -> None:
        """Moves a worker's layers to others, without a pause but for the switch; returns when it holds none.

        UsageError for a name that is not known, InsufficientMemoryError or WorkerError where the others cannot do
        without it."""
        self._worker(name)
        others = {other: handle for other, handle in self.usable.items() if other != name}
        if not others:
            raise WorkerError(f"no other worker is there that is not drained: {name} keeps its layers")
        await self._can_do(others)
        self.spared.add(name)
        self._change()
        await self._settled.wait()
        if self._holds(name):
            self.use_again(name)
            raise WorkerError(f"the layers of worker {name} could not be moved: see the log")

    def use_again(self, name: str) -> None:
        """Takes `spare` back; layers come when that is worth it. UsageError for a name that is not known."""
        self._worker(name)
        self.spared.discard(name)
        self._change()

    async def log(self, name: str) -> LogTail:
        """The last lines of a worker's log, as it tells them now. UsageError for a name that is not known; what
        `WorkerHandle.log` raises."""
        return await self._worker(name).log()

    def _worker(self, name: str) -> WorkerHandle:
        workers = self._registry.workers
        if name not in workers:
            raise UsageError(f"no worker is named {name!r}; there are: {', '.join(sorted(workers))}")
        return workers[name]

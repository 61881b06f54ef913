"""Links between workers, measured anew when somebody joins."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping

from llamaclust.cluster.membership.registry import Registry
from llamaclust.cluster.membership.worker_handle import WorkerHandle
from llamaclust.cluster.planner.links import Links
from llamaclust.cluster.state.events import News, Watch
from llamaclust.core.errors import LlamaclustError

MeasureLinks = Callable[[Mapping[str, WorkerHandle]], Awaitable[Links]]


class LinkKeeper:
    """Without `measure`, links are taken to be what they are known to be."""

    def __init__(
        self,
        measure: MeasureLinks | None,
        registry: Registry,
        know: Callable[[Links], None],
        settled: asyncio.Event,
        watch: Watch,
    ) -> None:
        """`know` hears of what was measured. `settled` is set while a pipeline serves and nothing is to be done, for
        that comes first."""
        self._measure = measure
        self._registry = registry
        self._know = know
        self._settled = settled
        self._watch = watch
        self._measuring: asyncio.Task[None] | None = None

    def joined(self) -> None:
        """Somebody has."""
        if self._measure is not None and (self._measuring is None or self._measuring.done()):
            self._measuring = asyncio.create_task(self._measure_all(self._measure))

    def close(self) -> None:
        if self._measuring is not None:
            self._measuring.cancel()

    async def _measure_all(self, measure: MeasureLinks) -> None:
        """Until those that were measured are those who are here."""
        present: dict[str, WorkerHandle] = {}
        while present != self._registry.present:
            await self._settled.wait()
            present = self._registry.present
            try:
                self._know(await measure(present))
            except LlamaclustError as error:
                self._watch(News(f"links were not measured anew: {error}"))
                return

"""Links between workers, measured again when a worker joins."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping

from llamaclust.cluster.control.observations import LinksChanged
from llamaclust.cluster.control.observed import Observed
from llamaclust.cluster.control.planning import ClusterPlanner
from llamaclust.cluster.membership.registry import Registry
from llamaclust.cluster.membership.worker_handle import WorkerHandle
from llamaclust.cluster.planner.links import Links
from llamaclust.cluster.state.events import Notice, Report
from llamaclust.core.errors import LlamaclustError
from llamaclust.wire.rpc.task_set import TaskSet

MeasureLinks = Callable[[Mapping[str, WorkerHandle]], Awaitable[Links]]


class LinkMonitor:
    """Without `measure`, links stay as they are known."""

    def __init__(
        self,
        measure: MeasureLinks | None,
        registry: Registry,
        planner: ClusterPlanner,
        observed: Observed,
        report: Report,
    ) -> None:
        self._measure = measure
        self._registry = registry
        self._planner = planner
        self._observed = observed
        self._report = report
        self._measuring = TaskSet()

    def measure_again(self) -> None:
        """Once the pipeline serves and nothing else is to be done."""
        if self._measure is not None and not len(self._measuring):
            self._measuring.start(self._measure_all(self._measure))

    def close(self) -> None:
        self._measuring.cancel()

    async def _measure_all(self, measure: MeasureLinks) -> None:
        """Until the measured workers are the present ones."""
        measured: dict[str, WorkerHandle] = {}
        while measured != self._registry.present:
            await self._observed.settled.wait()
            measured = self._registry.present
            try:
                links = await measure(measured)
            except LlamaclustError as error:
                self._report(Notice(f"links were not measured again: {error}"))
                return
            if self._planner.update(links):
                self._observed.post(LinksChanged())

"""Handles workers that join a running cluster. Unknown hardware is measured before plans use it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from llamaclust.cluster.control.observations import WorkerSeen
from llamaclust.cluster.control.resources.link_profiling import LinkMonitor
from llamaclust.cluster.membership.registry import Registry
from llamaclust.cluster.membership.worker_handle import WorkerHandle
from llamaclust.cluster.state.events import Notice, Report
from llamaclust.core.errors import LlamaclustError
from llamaclust.wire.rpc.deadlines import deadline
from llamaclust.wire.rpc.task_set import TaskSet

if TYPE_CHECKING:
    from llamaclust.cluster.control.actions import ActionRunner

_MEASURE_S = 60.0


@dataclass(frozen=True, slots=True, eq=False)
class Newcomers:
    _registry: Registry
    _runners: Sequence[ActionRunner]
    _links: LinkMonitor
    _report: Report
    _tasks: TaskSet = field(default_factory=TaskSet, init=False)

    async def close(self) -> None:
        await self._tasks.close()

    def joined(self, worker: WorkerHandle) -> None:
        for runner in self._runners:
            self._tasks.start(runner.epochs.announce(worker))
        self._links.measure_again()
        self.take(worker)

    def take(self, worker: WorkerHandle) -> None:
        if self._is_known(worker):
            self._observe(worker)
        else:
            self._tasks.start(self._measure(worker))

    def _is_known(self, worker: WorkerHandle) -> bool:
        present = self._registry.present
        return all(worker.name in runner.planner.profiles.of(present) for runner in self._runners)

    async def _measure(self, worker: WorkerHandle) -> None:
        """Measures the worker. If this fails, plans consider only its memory."""
        try:
            async with deadline(f"worker {worker.name}: measurement", _MEASURE_S):
                for runner in self._runners:
                    if worker.loss is None:
                        await runner.planner.profiles.measure([worker.name], self._registry.present)
            if worker.loss is None and self._is_known(worker):
                self._report(Notice(f"worker {worker.name} has been measured"))
        except LlamaclustError as error:
            self._report(Notice(f"worker {worker.name} is used without measurements: {error}"))
        self._observe(worker)

    def _observe(self, worker: WorkerHandle) -> None:
        for runner in self._runners if worker.loss is None else ():
            runner.store.post(WorkerSeen(worker.name, self._registry.joins[worker.name]))

"""Owns the workers, which all models share, and passes their events to the control loop of each model."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from llamaclust.cluster.config.cluster_config import ClusterConfig
from llamaclust.cluster.control import observations
from llamaclust.cluster.control.actions import ActionRunner
from llamaclust.cluster.control.partitions import PartitionTracker
from llamaclust.cluster.control.pool.closed_ports import ClosedPorts
from llamaclust.cluster.control.pool.drain import WorkerOperations
from llamaclust.cluster.control.pool.membership_watch import MembershipWatch
from llamaclust.cluster.control.pool.newcomers import Newcomers
from llamaclust.cluster.control.resources.link_profiling import LinkMonitor, MeasureLinks
from llamaclust.cluster.launchers.base import Launcher
from llamaclust.cluster.membership.registry import Registry
from llamaclust.cluster.planner.links import Pairs
from llamaclust.cluster.state.control_record import ControlRecord
from llamaclust.cluster.state.events import Notice, Report
from llamaclust.wire.rpc.task_set import TaskSet


@dataclass(frozen=True, slots=True)
class SupervisedWorkers:
    """Groups the objects that manage a cluster's workers. If `measure_links` is None, links are not measured again.
    The cluster waits at least `start_s` seconds for its workers to join."""

    registry: Registry
    launcher: Launcher
    record: ControlRecord
    start_s: float = 0.0
    measure_links: MeasureLinks | None = None


class WorkerPool:
    """The workers of a cluster. All models must be added to `runners` before `start` is called."""

    def __init__(self, config: ClusterConfig, workers: SupervisedWorkers, report: Report) -> None:
        registry = workers.registry
        self.workers = workers
        self.runners: list[ActionRunner] = []  # One runner for each model.
        # Tasks that end the processes of lost workers. A load waits for them, because it needs their memory.
        self.ending = TaskSet()
        self.partitions = PartitionTracker(
            lambda: registry.present,
            config.timeouts.worker,
            report,
            self._partitioned,
            ClosedPorts(report, self._ports_changed),
        )
        self.operations = WorkerOperations(registry, workers.record, self.runners, self.partitions, report)
        self._report = report
        self._links = LinkMonitor(workers.measure_links, registry, self.runners, report)
        newcomers = Newcomers(registry, self.runners, self._links, report)
        self._members = MembershipWatch(
            registry, workers.launcher, self.runners, newcomers, self.partitions, self.ending, report
        )

    def start(self) -> None:
        self._members.start()

    async def aclose(self) -> None:
        self._links.close()
        await asyncio.gather(self._members.close(), self.ending.close(), self.operations.recorded())

    def not_restarted(self, name: str, why: str) -> None:
        self._report(Notice(f"worker {name} is not started again: {why}; look at `llamaclust logs {name}`"))

    def _ports_changed(self) -> None:
        for runner in self.runners:
            runner.store.post(observations.Signal.LINKS_CHANGED)

    def _partitioned(self, pairs: Pairs) -> None:
        for runner in self.runners:
            runner.store.post(observations.PartitionsChanged(pairs))

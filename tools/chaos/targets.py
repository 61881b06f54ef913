"""Finds the workers, the coordinator and the links of a running cluster that can get a fault."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from llamaclust.cluster.state.directory import ClusterRecord
from llamaclust.tools.chaos import processes
from llamaclust.tools.chaos.links import WorkerLink, worker_links
from llamaclust.tools.chaos.processes import Process
from llamaclust.tools.chaos.schedule import FaultKind
from llamaclust.tools.chaos.worker_faults import FAILING, MUTE

_GONE = ("left", "lost")


@dataclass(frozen=True, slots=True)
class Permissions:
    """The allowed faults. `coordinator` allows killing a coordinator without a standby, and `joined_workers` allows
    killing workers that `llamaclust worker` started. In both cases, another program must restart the killed process."""

    coordinator: bool = False
    joined_workers: bool = False
    kinds: frozenset[FaultKind] = frozenset(FaultKind)

    def without_links(self) -> Permissions:
        return replace(self, kinds=frozenset(kind for kind in self.kinds if not kind.is_of_link))


@dataclass(frozen=True, slots=True)
class Targets:
    names: Mapping[FaultKind, tuple[str, ...]] = field(default_factory=dict)
    workers: Mapping[str, Process] = field(default_factory=dict)
    coordinator: Process | None = None
    links: Mapping[str, WorkerLink] = field(default_factory=dict)
    connected: tuple[str, ...] = ()  # Connected workers that are not drained.


def find_targets(
    record: ClusterRecord, status: Mapping[str, Any], permissions: Permissions, *, has_standby: bool
) -> Targets:
    workers = [worker for worker in status["workers"] if worker["state"] not in _GONE and not worker["drained"]]
    is_local = record.is_local
    found = {
        worker["name"]: processes.local_worker(worker, record.pid) if is_local else processes.joined_worker(worker)
        for worker in workers
    }
    own = {name: process for name, process in found.items() if process is not None}
    may_kill_workers = is_local or permissions.joined_workers
    coordinator = processes.coordinator(record.pid, record.start_ticks)
    cluster = () if coordinator is None else (record.name,)
    links = {} if coordinator is None else _links(record, workers, coordinator)
    names = {
        FaultKind.KILL: tuple(own) if may_kill_workers else (),
        FaultKind.STOP: tuple(own),
        FaultKind.DRAIN: tuple(found),
        FaultKind.COORDINATOR_KILL: cluster if has_standby or permissions.coordinator else (),
        FaultKind.COORDINATOR_STOP: cluster,
        FaultKind.DISK_FULL: cluster,
        FaultKind.PARTITION: tuple(links),
        FaultKind.SLOW_LINK: tuple(links),
        FaultKind.FAILS: tuple(name for name, process in own.items() if process.catches(FAILING)),
        FaultKind.MUTE: tuple(name for name, process in own.items() if process.catches(MUTE)),
    }
    allowed = {kind: able if kind in permissions.kinds else () for kind, able in names.items()}
    return Targets(allowed, own, coordinator, links, tuple(found))


def _links(record: ClusterRecord, workers: Sequence[Mapping[str, Any]], coordinator: Process) -> dict[str, WorkerLink]:
    if not processes.is_in_our_network(coordinator.pid):
        return {}
    own_ports = processes.listening_ports(coordinator.pid) - {int(record.api.rpartition(":")[2])}
    addresses = {each["name"]: [each["address"], *filter(None, [each.get("link_address")])] for each in workers}
    return worker_links(addresses, own_ports)

"""Faults that last until they are undone: stopped processes, full disks, disturbed links."""

from __future__ import annotations

import signal

from llamaclust.tools.chaos.firewall import Firewall
from llamaclust.tools.chaos.links import Disturbance, WorkerLink
from llamaclust.tools.chaos.processes import Process


class Stops:
    def __init__(self) -> None:
        self._processes: dict[str, Process] = {}

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._processes)

    def begin(self, name: str, process: Process) -> bool:
        self._processes[name] = process
        if process.send(signal.SIGSTOP):
            return True
        del self._processes[name]
        return False

    def end(self, name: str) -> None:
        if process := self._processes.pop(name, None):
            process.send(signal.SIGCONT)


class FullDisks:
    """Simulates full disks: a coordinator and the workers that it starts can write no bytes to files."""

    def __init__(self) -> None:
        self._limits: dict[str, tuple[Process, int]] = {}  # Process and its previous limit, by target.

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._limits)

    def begin(self, name: str, process: Process) -> bool:
        before = process.limit_files(0)
        if before is not None:
            self._limits[name] = process, before
        return before is not None

    def make_room(self, name: str) -> None:
        process, before = self._limits[name]
        for writer in (process, *process.children()):
            writer.limit_files(before)

    def end(self, name: str) -> None:
        if name in self._limits:
            self.make_room(name)
            del self._limits[name]


class DisturbedLinks:
    """Disturbs links of workers. The kernel ends a disturbance after `hold_s` seconds if `end` was not called."""

    def __init__(self, firewall: Firewall | None) -> None:
        self._firewall = firewall
        self._labels: dict[str, str] = {}  # Label of the nftables rules, by worker.
        self._serial = 0

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._labels)

    def begin(self, name: str, link: WorkerLink, disturbance: Disturbance, hold_s: float) -> None:
        assert self._firewall is not None, "without a firewall, links are no targets"
        self._serial += 1
        label = f"fault{self._serial}"
        self._firewall.run(link.commands(self._firewall.table, label, disturbance, hold_s))
        self._labels[name] = label

    def end(self, name: str) -> None:
        if self._firewall is not None and (label := self._labels.pop(name, None)):
            self._firewall.run(WorkerLink.end_commands(self._firewall.table, label))

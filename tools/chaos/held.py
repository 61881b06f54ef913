"""Faults of processes that last until they are undone: stops and full disks."""

from __future__ import annotations

import signal

from llamaclust.tools.chaos.processes import Process


class Stops:
    """Stopped processes by the names of their targets."""

    def __init__(self) -> None:
        self._processes: dict[str, Process] = {}

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._processes)

    def begin(self, name: str, process: Process) -> bool:
        """Whether it was there."""
        self._processes[name] = process
        if process.send(signal.SIGSTOP):
            return True
        del self._processes[name]
        return False

    def end(self, name: str) -> None:
        """One that was replaced meanwhile has ended."""
        if process := self._processes.pop(name, None):
            process.send(signal.SIGCONT)


class FullDisks:
    """Coordinators whose writes fail as on a full disk, and those of workers that they start meanwhile, by the names
    of their targets."""

    def __init__(self) -> None:
        self._limits: dict[str, tuple[Process, int]] = {}  # of files, before

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._limits)

    def begin(self, name: str, process: Process) -> bool:
        """Whether it was there."""
        before = process.limit_files(0)
        if before is not None:
            self._limits[name] = process, before
        return before is not None

    def make_room(self, name: str) -> None:
        """The target is still held."""
        process, before = self._limits[name]
        for writer in (process, *process.children()):
            writer.limit_files(before)

    def end(self, name: str) -> None:
        if name in self._limits:
            self.make_room(name)
            del self._limits[name]

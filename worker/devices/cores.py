"""The CPU cores that this process may use, as Linux lists them, with hardware threads, core kinds and NUMA nodes."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from llamaclust.core.cgroups import cpu_quota, read_text
from llamaclust.core.errors import UsageError

_ROOT = Path("/")
_SYSTEM = "sys/devices/system"
_EFFICIENCY_PMUS = ("cpu_atom", "cpu_lowpower")
"""Performance counters that only the efficiency cores of Intel CPUs have."""
_PERFORMANCE_SHARE = 0.75
"""An ARM core counts as a performance core if its `cpu_capacity` is at least this share of the largest."""


@dataclass(frozen=True, slots=True)
class Core:
    hardware_threads: tuple[int, ...]  # Hardware threads that this process may use.
    is_efficiency: bool = False
    node: int = 0


@dataclass(frozen=True, slots=True)
class Cores:
    """The usable CPU cores. `online` counts the machine's hardware threads. `quota` is in CPUs (None: no limit)."""

    cores: tuple[Core, ...]
    online: int
    quota: float | None = None

    @property
    def count(self) -> int:
        """The best number of compute threads: one per core, but not more than the rounded-up CPU quota."""
        return max(1, len(self.cores) if self.quota is None else min(len(self.cores), math.ceil(self.quota)))

    @property
    def nodes(self) -> tuple[int, ...]:
        return tuple(sorted({core.node for core in self.cores}))

    @property
    def hardware_threads(self) -> tuple[int, ...]:
        return tuple(sorted(number for core in self.cores for number in core.hardware_threads))

    def on_node(self, node: int) -> Cores:
        cores = tuple(core for core in self.cores if core.node == node)
        if not cores:
            known = ", ".join(map(str, self.nodes))
            raise UsageError(
                f"numa_node {node}: this process may not use the cores of this node, only those of NUMA node {known}"
            )
        return Cores(cores, self.online, self.quota)

    def __str__(self) -> str:
        text = f"{len(self.cores)} physical core{'s' if len(self.cores) > 1 else ''}"
        details = [_kinds(self.cores)] if any(core.is_efficiency for core in self.cores) else []
        usable = len(self.hardware_threads)
        if usable < self.online:
            details.append(f"{usable} of {self.online} hardware threads, by affinity or cpuset")
        elif usable > len(self.cores):
            details.append(f"{usable} hardware threads")
        text += f" ({'; '.join(details)})" if details else ""
        if self.quota is not None and math.ceil(self.quota) < len(self.cores):
            text += f" with a CPU quota of {self.quota:g}"
        return text

    def lines(self, threads: int) -> tuple[str, ...]:
        return (self.threads_text(threads), *([self.nodes_text] if len(self.nodes) > 1 else []))

    @property
    def nodes_text(self) -> str:
        options = " and ".join(f"--numa-node {node}" for node in self.nodes)
        better = "one worker per node is faster, because each worker then reads only its own node's memory"
        return f"{len(self.nodes)} NUMA nodes: {better}: {options}, or numa_node of local workers"

    def threads_text(self, threads: int) -> str:
        text = f"{threads} compute thread{'s' if threads > 1 else ''} for {self}"
        return (
            f"{text}; more threads than that are slower: set threads to {self.count}" if threads > self.count else text
        )


def _kinds(cores: Sequence[Core]) -> str:
    efficiency = sum(core.is_efficiency for core in cores)
    return f"{len(cores) - efficiency} performance, {efficiency} efficiency"


def read_cores(root: Path = _ROOT, affinity: Iterable[int] | None = None) -> Cores:
    """Reads usable cores from files below `root`. If the topology is unknown, each hardware thread counts as a core."""
    usable = sorted(os.sched_getaffinity(0) if affinity is None else affinity)
    efficiency, nodes = _efficiency(root, usable), _nodes(root)
    siblings: dict[str, list[int]] = {}
    for number in usable:
        text = read_text(root / f"{_SYSTEM}/cpu/cpu{number}/topology/thread_siblings_list").strip()
        siblings.setdefault(text or str(number), []).append(number)
    cores = (Core(tuple(found), found[0] in efficiency, nodes.get(found[0], 0)) for found in siblings.values())
    online = len(_numbers(read_text(root / f"{_SYSTEM}/cpu/online")))
    return Cores(tuple(cores), max(online, len(usable)), cpu_quota(root))


def physical_cores(root: Path = _ROOT, affinity: Iterable[int] | None = None) -> int:
    return read_cores(root, affinity).count


def bind_to_node(node: int, root: Path = _ROOT) -> None:
    """Binds this thread, and threads that it starts, to one NUMA node. Linux then prefers the memory of this node."""
    os.sched_setaffinity(0, read_cores(root).on_node(node).hardware_threads)


def _efficiency(root: Path, usable: Iterable[int]) -> set[int]:
    named = {number for pmu in _EFFICIENCY_PMUS for number in _numbers(read_text(root / f"sys/devices/{pmu}/cpus"))}
    if named:
        return named
    texts = {number: read_text(root / f"{_SYSTEM}/cpu/cpu{number}/cpu_capacity").strip() for number in usable}
    capacities = {number: int(text) for number, text in texts.items() if text.isdigit()}
    largest = max(capacities.values(), default=0)
    return {number for number, capacity in capacities.items() if capacity < _PERFORMANCE_SHARE * largest}


def _nodes(root: Path) -> dict[int, int]:
    found = {}
    for folder in sorted((root / f"{_SYSTEM}/node").glob("node[0-9]*")):
        for number in _numbers(read_text(folder / "cpulist")):
            found[number] = int(folder.name.removeprefix("node"))
    return found


def _numbers(text: str) -> list[int]:
    numbers: list[int] = []
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        if first.isdigit() and (last or first).isdigit():
            numbers.extend(range(int(first), int(last or first) + 1))
    return numbers

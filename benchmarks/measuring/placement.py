"""Cores for the processes of a benchmark: some virtual machines leave a process that wakes on the core it last had, be
another one idle, so that figures depend on where processes began."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from llamaclust.cluster.server.coordinator import Cluster


@contextmanager
def pinned_to_cores(cluster: Cluster) -> Iterator[None]:
    """Workers of one thread each to a core each, in the stages' order, as far as there are cores, and this process, the
    coordinator, to the second core: not that of a first stage, which begins when the coordinator gets a result."""
    cores = sorted(os.sched_getaffinity(0))
    present = cluster.registry.present
    workers = [str(present[stage.worker].registration.pid) for stage in cluster.engine.metrics.stage_report()]
    threads = [Path("/proc/self/task"), *(Path(f"/proc/{worker}/task") for worker in workers)]
    before = {int(each.name): os.sched_getaffinity(int(each.name)) for folder in threads for each in folder.iterdir()}
    for folder, core in zip(threads, [*cores[1:2], *cores], strict=False):
        _pin((int(each.name) for each in folder.iterdir()), {core})
    try:
        yield
    finally:
        for thread, allowed in before.items():
            _pin([thread], allowed)


def pin_process(pid: int, core: int) -> None:
    """All threads that it has, and those that they start."""
    _pin((int(each.name) for each in Path(f"/proc/{pid}/task").iterdir()), {core})


def _pin(threads: Iterable[int], cores: Collection[int]) -> None:
    for thread in threads:
        with suppress(ProcessLookupError):  # it has just ended
            os.sched_setaffinity(thread, cores)

"""Cores for the processes of a benchmark: some virtual machines leave a process that wakes on the core it last had, be
another one idle, so that figures depend on where processes began."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from llamaclust.cluster.server.coordinator import Cluster


@contextmanager
def placed(cluster: Cluster) -> Iterator[None]:
    """Each stage's worker on a core of its own, in the stages' order, and this process, the coordinator, on the second
    one: beside a single worker, or with the last of two stages, which has no work when it hands a result on."""
    cores = sorted(os.sched_getaffinity(0))
    workers = [
        str(cluster.registry.present[stage.worker].registration.pid) for stage in cluster.engine.metrics.stage_report()
    ]
    for worker, core in zip(workers, cores, strict=False):
        _bind(worker, {core})
    _bind("self", cores[1:2] or cores)
    try:
        yield
    finally:
        for process in ("self", *workers):
            _bind(process, cores)


def _bind(process: str, cores: Collection[int]) -> None:
    for thread in Path(f"/proc/{process}/task").iterdir():
        with suppress(ProcessLookupError):  # it has just ended
            os.sched_setaffinity(int(thread.name), cores)

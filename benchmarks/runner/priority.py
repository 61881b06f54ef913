"""Runs processes before all other programs of the machine while they are measured."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def before_other_programs(pids: Iterable[int], *, priority: int = 1) -> Iterator[None]:
    """Gives the processes' current threads real-time priority within the context. Raises PermissionError if that is not
    permitted."""
    threads = [int(each.name) for pid in pids for each in Path(f"/proc/{pid}/task").iterdir()]
    try:
        _schedule(threads, os.SCHED_RR, priority)
        yield
    finally:
        _schedule(threads, os.SCHED_OTHER, 0)


def _schedule(threads: Iterable[int], policy: int, priority: int) -> None:
    for thread in threads:
        with suppress(ProcessLookupError):  # it has just ended
            os.sched_setscheduler(thread, policy, os.sched_param(priority))

"""The load of other programs while a benchmark measures, from the processor times of the machine and of its own."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from statistics import median

import psutil


class Idleness:
    """Collects, for each stretch of time that is watched, how many cores other programs used."""

    def __init__(self) -> None:
        self._cores: list[float] = []

    @contextmanager
    def watched(self, pids: Iterable[int]) -> Iterator[None]:
        """`pids`: the benchmark's processes besides this one."""
        own = [os.getpid(), *pids]
        begun_s, machine_s, own_s = time.monotonic(), _machine_s(), _own_s(own)
        yield
        took_s = time.monotonic() - begun_s
        self._cores.append(max(0.0, (_machine_s() - machine_s - (_own_s(own) - own_s)) / took_s))

    def __str__(self) -> str:
        found = self._cores or [0.0]
        return f"other programs used {median(found):.2f} cores, at most {max(found):.2f}, of {os.cpu_count()}"


def _machine_s() -> float:
    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system + times.irq + times.softirq + times.steal)


def _own_s(pids: Iterable[int]) -> float:
    total = 0.0
    for pid in pids:
        with suppress(psutil.NoSuchProcess):
            times = psutil.Process(pid).cpu_times()
            total += times.user + times.system
    return total

"""Processor load of other programs during a measurement, which much of it makes meaningless."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

_STAT = Path("/proc/stat")


@dataclass(frozen=True, slots=True)
class OtherLoad:
    """In cores, of the `cores` that this process may use; stolen ones went to other virtual machines."""

    cores: int
    others: float
    stolen: float

    @property
    def is_much(self) -> bool:
        """More than a tenth of the processor."""
        return self.others + self.stolen > 0.1 * self.cores


class _Seconds(NamedTuple):
    """Of these cores since the machine started; own ones with those of children that have ended."""

    busy: float
    stolen: float
    own: float
    at: float


class LoadMeter:
    """From its start to each call of `measure`."""

    def __init__(self) -> None:
        self._started = _read()

    def measure(self) -> OtherLoad | None:
        """None where /proc/stat is unavailable, or after less than 0.1 s."""
        before, after = self._started, _read()
        if before is None or after is None or after.at - before.at < 0.1:
            return None
        busy, stolen, own, elapsed = (end - start for start, end in zip(before, after, strict=True))
        return OtherLoad(len(os.sched_getaffinity(0)), max(0.0, busy - own) / elapsed, max(0.0, stolen) / elapsed)


def _read() -> _Seconds | None:
    try:
        lines = _STAT.read_text().splitlines()
    except OSError:
        return None
    names, tick = {f"cpu{core}" for core in os.sched_getaffinity(0)}, os.sysconf("SC_CLK_TCK")
    busy = stolen = 0
    for name, *values in map(str.split, lines):
        if name in names and len(values) >= 8:
            user, nice, system, _idle, _wait, interrupts, soft, steal = map(int, values[:8])
            busy, stolen = busy + user + nice + system + interrupts + soft, stolen + steal
    own = os.times()
    mine = own.user + own.system + own.children_user + own.children_system
    return _Seconds(busy / tick, stolen / tick, mine, perf_counter())

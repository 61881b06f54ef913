"""Points in time that later processes, also those of another machine, measure from. Pure but for `Instant.now`."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cache

from llamaclust.core.this_machine import machine_id


@dataclass(frozen=True, slots=True)
class Instant:
    """By two clocks: the time since the machine started, which is never set, and Unix time for other machines."""

    unix_s: float
    boot_s: float
    machine: str  # see `machine_id`; another one after each start of the machine

    @classmethod
    def now(cls) -> Instant:
        return cls(time.time(), boot_s(), _machine())

    def passed_s(self, until: Instant) -> float:
        """Between machines, at least 0: their clocks may differ."""
        if self.machine == until.machine:
            return until.boot_s - self.boot_s
        return max(0.0, until.unix_s - self.unix_s)


def boot_s() -> float:
    """Since the machine started; goes on while it sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


_machine = cache(machine_id)

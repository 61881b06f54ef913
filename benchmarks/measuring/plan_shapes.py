"""The clusters that `plan.py` compares plans and measurements on."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "tests"))

from support.network.link import Link


@dataclass(frozen=True, slots=True)
class Shape:
    """Workers a, b, ...: threads, and what each may take; links to hosts of their own where there are some."""

    name: str
    what: str
    is_large: bool
    threads: tuple[int, ...]
    memory_mib: tuple[int | None, ...] = ()
    links: tuple[Link, ...] = ()  # of each worker's host; the coordinator's has no delay
    objective: str = "latency"

    @property
    def workers(self) -> dict[str, tuple[int, int | None]]:
        """(threads, memory) by name."""
        memory = self.memory_mib or (None,) * len(self.threads)
        return {chr(97 + index): both for index, both in enumerate(zip(self.threads, memory, strict=True))}


def at(round_trip_ms: float, rate_mbit: int | None = None) -> Link:
    """Links add up, and each host delays what it sends."""
    return Link(round_trip_ms / 2e3, None if rate_mbit is None else rate_mbit * 10**6)


MIXED = (at(1), at(4), at(20, 50))

SHAPES = (
    Shape("one", "small, one worker of one thread", False, (1,)),
    Shape("two", "small, two alike, throughput", False, (1, 1), objective="throughput"),
    Shape("threads", "small, one and two threads, throughput", False, (2, 1), objective="throughput"),
    Shape("large", "large, one worker of two threads", True, (2,)),
    Shape("large-two", "large, two alike, memory for less than all on each", True, (1, 1), (740, 740)),
    Shape("uneven", "large, memory for a third on one of two", True, (1, 1), (740, 460)),
    Shape("three", "large, memory for less than half on each", True, (1, 1, 1), (430,) * 3),
    Shape("large-both", "large, two alike, throughput", True, (1, 1), objective="throughput"),
    Shape("near", "large, two hosts, round trip 0.5 ms", True, (1, 1), (740, 740), (at(0.5), at(0.5))),
    Shape("far", "large, one host 5 ms away", True, (1, 1), (740, 740), (at(0.5), at(5))),
    Shape("mixed", "large, hosts 1, 4 ms, 20 ms at 50 Mbit/s away", True, (1,) * 3, (430,) * 3, MIXED),
)

"""Keeps workers that accuse each other in different groups for a limited time, which grows with each dispute."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from llamaclust.cluster.planner.links import Pair, Pairs
from llamaclust.core.backoff import Backoff

_BACKOFF = Backoff(first_s=120.0, max_s=7200.0, factor=3.0)


@dataclass(frozen=True, slots=True)
class DisputeRecord:
    number: int  # Number of disputes of the pair.
    pause_s: float
    end_s: float


@dataclass(frozen=True, slots=True)
class Disputes:
    records: Mapping[Pair, DisputeRecord] = field(default_factory=dict)

    def add(self, pair: Pair, now_s: float) -> Disputes:
        before = self.records.get(pair)
        if before is not None and now_s < before.end_s:
            return self
        number = 1 if before is None else before.number + 1
        pause_s = _BACKOFF.pause_s(number - 1)
        return replace(self, records={**self.records, pair: DisputeRecord(number, pause_s, now_s + pause_s)})

    def pairs(self, now_s: float) -> Pairs:
        return frozenset(pair for pair, record in self.records.items() if record.end_s > now_s)

    def next_end_s(self, now_s: float) -> float | None:
        return min((record.end_s for record in self.records.values() if record.end_s > now_s), default=None)

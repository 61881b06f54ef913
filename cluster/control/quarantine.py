"""Workers that failed to load: plans exclude them for a time, where the others suffice.

Such a worker often joins again at once, as on a machine with a bad disk, and would fail the next plan, too.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from llamaclust.core.backoff import Backoff

_BACKOFF = Backoff(first_s=10.0, max_s=600.0)


@dataclass(frozen=True, slots=True)
class Quarantine:
    """By worker; twice as long after each failure."""

    failures: Mapping[str, int] = field(default_factory=dict)
    until_s: Mapping[str, float] = field(default_factory=dict)

    def add(self, name: str, now_s: float) -> Quarantine:
        failures = self.failures.get(name, 0)
        until_s = now_s + _BACKOFF.pause_s(failures)
        return Quarantine({**self.failures, name: failures + 1}, {**self.until_s, name: until_s})

    def release(self, names: Collection[str]) -> Quarantine:
        """Workers that took part in an epoch, or that an operator makes available again."""
        failures = {name: count for name, count in self.failures.items() if name not in names}
        return Quarantine(failures, {name: end_s for name, end_s in self.until_s.items() if name not in names})

    def names(self, now_s: float) -> frozenset[str]:
        """The workers that are excluded now."""
        return frozenset(name for name, end_s in self.until_s.items() if end_s > now_s)

    def next_end_s(self, now_s: float) -> float | None:
        return min((end_s for end_s in self.until_s.values() if end_s > now_s), default=None)

"""Workers that plans exclude for a time. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from llamaclust.core.backoff import Backoff

_BACKOFF = Backoff(first_s=10.0, max_s=600.0)


@dataclass(frozen=True, slots=True)
class Quarantine:
    """Workers that failed to load: plans exclude them for a time, twice as long after each failure, where the others
    suffice. Such a worker often joins again at once, as on a machine with a bad disk, and would fail the next plan.
    """

    terms: Mapping[str, tuple[int, float]] = field(default_factory=dict)  # by name, (failures, end in s)

    def add(self, name: str, now_s: float) -> Quarantine:
        failures, _ = self.terms.get(name, (0, 0.0))
        return Quarantine({**self.terms, name: (failures + 1, now_s + _BACKOFF.pause_s(failures))})

    def release(self, names: Collection[str]) -> Quarantine:
        """Workers that took part in an epoch, or that an operator makes available again."""
        return Quarantine({name: term for name, term in self.terms.items() if name not in names})

    def names(self, now_s: float) -> frozenset[str]:
        """The workers that are excluded now."""
        return frozenset(name for name, (_, end_s) in self.terms.items() if end_s > now_s)

    def next_end_s(self, now_s: float) -> float | None:
        return min((end_s for _, end_s in self.terms.values() if end_s > now_s), default=None)

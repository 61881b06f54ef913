from __future__ import annotations

from dataclasses import dataclass

_MAX_DOUBLINGS = 64  # failures can go on for hours; a float ends at 2 ** 1024


@dataclass(frozen=True, slots=True)
class Backoff:
    """Pauses that grow with each failure: first_s, first_s * factor, first_s * factor ** 2, ... up to max_s seconds."""

    first_s: float
    max_s: float
    factor: float = 2.0

    def pause_s(self, failures: int) -> float:
        return min(self.first_s * self.factor ** min(failures, _MAX_DOUBLINGS), self.max_s)

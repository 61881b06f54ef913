from __future__ import annotations

from dataclasses import dataclass

_MAX_DOUBLINGS = 64  # Failures can continue for hours, but a float cannot exceed 2 ** 1024.


@dataclass(frozen=True, slots=True)
class Backoff:
    """Pauses between attempts, in seconds: first_s, first_s * factor, first_s * factor ** 2, and so on up to max_s."""

    first_s: float
    max_s: float
    factor: float = 2.0

    def pause_s(self, failures: int) -> float:
        return min(self.first_s * self.factor ** min(failures, _MAX_DOUBLINGS), self.max_s)

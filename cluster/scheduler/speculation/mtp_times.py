"""Times of an MTP head on the last stage."""

from __future__ import annotations

_WEIGHT = 0.125
_LATE = 4.0


class MtpTimes:
    def __init__(self) -> None:
        self._step_ns: dict[int, float] = {}  # Nanoseconds per drafted token, by number of sequences.

    def learn(self, sequences: int, tokens: int, taken_ns: int) -> None:
        sample = taken_ns / max(tokens, 1)
        before = self._step_ns.get(sequences, sample)
        self._step_ns[sequences] = before + _WEIGHT * (min(sample, _LATE * before) - before)

    def draft_ns(self, sequences: int, tokens: int) -> float | None:
        if not self._step_ns:
            return None
        nearest = min(self._step_ns, key=lambda known: abs(known - sequences))
        return tokens * self._step_ns[nearest]

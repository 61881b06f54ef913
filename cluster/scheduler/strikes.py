"""Requests that may be why a pipeline failed: after a second failure each is computed alone, until one is found guilty.
Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from llamaclust.cluster.scheduler.sequences import Phase, Sequence, SequenceSlice

_ISOLATED = 2
"""Strikes from which on a request is computed with nothing else in flight, so that the next failure is its own. After
the first one it is not: requests are seldom the cause, and to compute all of them one by one takes long."""
MAX_STRIKES = 4
"""Of one request, the last two alone: a worker may be lost at any time, but hardly twice during the same few rows."""


@dataclass(slots=True)
class _Record:
    """Of a sequence that was in flight when a pipeline failed: rows [0, end) had been sent. A result for them ends
    it."""

    sequence: Sequence
    strikes: int = 0
    end: int = 0


class Strikes:
    """Failures of the pipeline while a sequence was in flight, since its rows of then were computed."""

    def __init__(self) -> None:
        self._records: dict[int, _Record] = {}  # by the sequence's key

    @property
    def isolated(self) -> Sequence | None:
        """The next one to compute with nothing else in flight: one that failed so already, or else the oldest."""
        found = [record for record in self._records.values() if record.strikes >= _ISOLATED]
        return max(found, key=lambda record: record.strikes).sequence if found else None

    def add(self, slices: Iterable[SequenceSlice]) -> list[Sequence]:
        """The pipeline failed with these in flight. Returns the sequences that are to fail."""
        struck: dict[int, _Record] = {}
        for taken in slices:
            key = taken.sequence.key
            if taken.sequence.phase is not Phase.FINISHED:
                struck[key] = self._records.setdefault(key, _Record(taken.sequence))
                struck[key].end = max(struck[key].end, _end(taken))
        for record in struck.values():
            record.strikes += 1
        return [record.sequence for record in struck.values() if record.strikes >= MAX_STRIKES]

    def computed(self, taken: SequenceSlice) -> None:
        """The pipeline has computed these rows."""
        record = self._records.get(taken.sequence.key)
        if record is not None and _end(taken) >= record.end:
            self.forget(taken.sequence)

    def move(self, sequence: Sequence, other: Strikes) -> None:
        """Another pipeline computes it from now on."""
        if (record := self._records.pop(sequence.key, None)) is not None:
            other._records[sequence.key] = record

    def forget(self, sequence: Sequence) -> None:
        self._records.pop(sequence.key, None)


def _end(taken: SequenceSlice) -> int:
    return taken.chunk.position + len(taken.chunk.tokens)

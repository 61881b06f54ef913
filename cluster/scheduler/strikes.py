"""Finds requests that make a pipeline fail.

Rows that were in flight at a failure, and were not computed since, are suspected. If the pipeline fails again with
suspected rows of a request in flight, the request is isolated: it is computed alone, a few suspected rows at a time. If
they do not fail, the request is cleared. It fails after four failures in isolation."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from llamaclust.cluster.scheduler.rows.slice import SequenceSlice
from llamaclust.cluster.scheduler.sequences import Phase, Sequence

_ISOLATED = 2
"""Number of strikes from which a request is isolated."""
# A few rows take about 0.02 s (SmolLM2). If workers are lost for other reasons once per second, a harmless request
# fails with a probability of at most 0.02 ** 3, because the first of the four failures only narrows its rows.
MAX_STRIKES = 6
"""Number of strikes at which a request fails. Strikes above `_ISOLATED` count only while the request is isolated."""
_PROBED_ROWS = 8
"""Number of suspected rows in a microbatch."""
_MOST_SUSPECTED = 3


@dataclass(slots=True)
class _Suspected:
    start: int
    end: int
    strikes: int

    def overlaps(self, rows: range) -> bool:
        return self.start < rows.stop and rows.start < self.end

    def strike(self, rows: range, *, is_alone: bool) -> None:
        self.start, self.end = max(self.start, rows.start), min(self.end, rows.stop)
        self.strikes += is_alone or self.strikes < _ISOLATED


@dataclass(frozen=True, slots=True)
class FailedSequence:
    """A sequence that must fail. `has_results` is true if a result arrived between its first and last failure."""

    sequence: Sequence
    workers: frozenset[str | None]
    has_results: bool


@dataclass(slots=True)
class _Record:
    sequence: Sequence
    suspected: list[_Suspected] = field(default_factory=list)
    # Number of failures while the request was isolated and none of its suspected rows was in flight.
    interrupted: int = 0
    # Workers at fault in the recorded failures. None: the worker is unknown.
    workers: set[str | None] = field(default_factory=set)
    has_results: bool = False  # True if some result has arrived since the first failure.

    @property
    def strikes(self) -> int:
        return max(suspected.strikes for suspected in self.suspected)

    def strike(self, rows: range, *, is_alone: bool) -> bool:
        """Records a failure with `rows` in flight. Returns True if the failure is evidence against the sequence."""
        found = [suspected for suspected in self.suspected if suspected.overlaps(rows)]
        for suspected in found:
            suspected.strike(rows, is_alone=is_alone)
        if not found:
            new = _Suspected(rows.start, rows.stop, _ISOLATED if is_alone else 1)
            self.suspected = [*self.suspected, new][-_MOST_SUSPECTED:]
        return bool(found)

    def computed(self, end: int) -> None:
        for suspected in self.suspected:
            suspected.start = max(suspected.start, end)
        self.suspected = [suspected for suspected in self.suspected if suspected.start < suspected.end]


class Strikes:
    def __init__(self) -> None:
        self._records: dict[int, _Record] = {}
        # True if no request is isolated until the next failure, so that other requests continue.
        self._is_paused = False

    @property
    def isolated(self) -> Sequence | None:
        """The sequence to compute alone next, or None."""
        record = self._isolated
        return None if record is None else record.sequence

    @property
    def _isolated(self) -> _Record | None:
        found = [record for record in self._records.values() if record.strikes >= _ISOLATED]
        return None if self._is_paused else max(found, key=lambda r: (-r.interrupted, r.strikes), default=None)

    def rows(self, isolated: Sequence) -> int:
        """Returns how many rows of the isolated sequence are computed next."""
        scheduled = isolated.scheduled
        ahead = [each.start - scheduled for each in self._records[isolated.key].suspected if each.end > scheduled]
        to_suspected = min(ahead, default=0)
        return to_suspected if to_suspected > 0 else _PROBED_ROWS

    def add(self, slices: Iterable[SequenceSlice], worker: str | None = None) -> list[FailedSequence]:
        """Records that the pipeline failed with these slices in flight. `worker` is the worker at fault, or None if it
        is unknown. Returns the sequences that must fail."""
        in_flight = _rows_in_flight(slices)
        isolated = self._isolated
        is_alone = isolated is not None and list(in_flight) == [isolated.sequence]
        struck = []
        for sequence, rows in in_flight.items():
            record = self._records.setdefault(sequence.key, _Record(sequence))
            record.workers.add(worker)
            if record.strike(rows, is_alone=is_alone):
                struck.append(record)
        self._is_paused = isolated is not None and isolated not in struck
        if isolated is not None and self._is_paused:
            isolated.interrupted += 1
        return [
            FailedSequence(record.sequence, frozenset(record.workers), record.has_results)
            for record in struck
            if record.strikes >= MAX_STRIKES
        ]

    def computed(self, sequence: Sequence, end: int) -> None:
        for other in self._records.values():
            other.has_results = True
        record = self._records.get(sequence.key)
        if record is not None:
            record.computed(end)
            if not record.suspected:
                self.forget(sequence)

    def move(self, sequence: Sequence, other: Strikes) -> None:
        if (record := self._records.pop(sequence.key, None)) is not None:
            other._records[sequence.key] = record

    def forget(self, sequence: Sequence) -> None:
        self._records.pop(sequence.key, None)


def _rows(taken: SequenceSlice) -> range:
    return range(taken.chunk.position, taken.end)


def _rows_in_flight(slices: Iterable[SequenceSlice]) -> dict[Sequence, range]:
    found: dict[Sequence, range] = {}
    for taken in slices:
        if taken.sequence.phase is not Phase.FINISHED and not taken.is_stale:
            rows, before = _rows(taken), found.get(taken.sequence, _rows(taken))
            found[taken.sequence] = range(min(rows.start, before.start), max(rows.stop, before.stop))
    return found

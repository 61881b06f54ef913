"""Decides which sequences with slow grammar matchers get rows in the next microbatch. The last stage runs matchers one
after another, so all slow matchers in flight share a limited time. Owners take turns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from collections.abc import Sequence as Items
from typing import TYPE_CHECKING

from llamaclust.cluster.scheduler.sequence_choice import request_key
from llamaclust.cluster.scheduler.stage_times import StageTimes
from llamaclust.core.sampler.bounds import MAX_FORCED_TOKENS

if TYPE_CHECKING:
    from llamaclust.cluster.scheduler.rows.slice import SequenceSlice
    from llamaclust.cluster.scheduler.sequences import Sequence

_LEAST_NS = 50_000_000
"""Total CPU time in nanoseconds that slow matchers in flight may always take."""
_LONGER = 0.25
"""Limit for the total CPU time of slow matchers in flight, as a share of a decode microbatch's time. The limit is at
least `_LEAST_NS` and at most `_MOST_NS`."""
_MOST_NS = 400_000_000
"""Maximum total nanoseconds of CPU time for slow matchers in flight."""
_NEXT_ROWS = 1 + MAX_FORCED_TOKENS
"""A sequence is held back only if it has at most this number of rows left. With more, it is in prefill."""


class MatcherTurns:
    def __init__(self, times: StageTimes) -> None:
        self._times = times
        self._turn = 0
        self._next: list[Sequence] = []  # Sequences with slow matchers that may run next, in order.

    def held(self, running: Items[Sequence]) -> frozenset[Sequence]:
        """Returns the sequences that get no rows in the next microbatch because their matchers are slow."""
        slow = [sequence for sequence in running if sequence.matcher.is_slow]
        self._next = []
        if len(slow) < 2:
            return frozenset()
        in_flight = [sequence for sequence in slow if sequence.sampling]
        idle = [sequence for sequence in slow if not sequence.sampling and sequence.remaining <= _NEXT_ROWS]
        left_ns = self._most_ns(running, slow) - sum(sequence.matcher.step_ns for sequence in in_flight)
        for sequence in self._in_turn(slow, idle):
            left_ns -= sequence.matcher.step_ns
            if left_ns < 0 and (in_flight or self._next):
                break
            self._next.append(sequence)
        return frozenset(idle).difference(self._next)

    def _in_turn(self, slow: Iterable[Sequence], idle: Iterable[Sequence]) -> Iterable[Sequence]:
        owners, requests, turn = Counter[str](), Counter[str](), self._turn
        for sequence in sorted(slow, key=_by_turn):
            owners[sequence.request.owner] = requests[request_key(sequence)] = sequence.matcher.turn
        left = [*idle]
        while left:
            first = min(left, key=lambda s: (owners[s.request.owner], requests[request_key(s)], s.matcher.turn, s.key))
            left.remove(first)
            turn += 1
            owners[first.request.owner] = requests[request_key(first)] = turn
            yield first

    def _most_ns(self, running: Items[Sequence], slow: Items[Sequence]) -> float:
        if len(slow) == len(running) and len({sequence.request.owner for sequence in slow}) == 1:
            return _MOST_NS
        return min(max(_LEAST_NS, _LONGER * (self._times.decode_ns or 0.0)), _MOST_NS)

    def launched(self, slices: Iterable[SequenceSlice]) -> None:
        if self._next:
            launched = {taken.sequence for taken in slices if taken.sampled}
            for sequence in filter(launched.__contains__, self._next):
                self._turn += 1
                sequence.matcher.turn = self._turn


def _by_turn(sequence: Sequence) -> int:
    return sequence.matcher.turn

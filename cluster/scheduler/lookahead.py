"""How many decode steps are sent before the tokens that they follow are known.

A worker that holds the whole model computes them one after the other, so where steps are short, several are sent and
answered together: coordinator and worker are awake once for all of them, and take less of the cores that compute.
"""

from __future__ import annotations

from collections.abc import Iterable

from llamaclust.cluster.scheduler.sequences import Phase, Sequence
from llamaclust.cluster.scheduler.stage_times import StageTimes


class Lookahead:
    """Of one scheduler."""

    def __init__(self, times: StageTimes, *, has_states: bool) -> None:
        self._times = times
        self._has_states = has_states  # the states of rows that others follow are kept for one step
        self._is_filling = False  # steps are sent until there are enough

    def steps(self, under_way: int, running: Iterable[Sequence], *, keeps_one: bool) -> int:
        """How many unknown tokens a step may follow now, 0 where none is to be sent; one at most with `keeps_one`.
        Where several may be, none is sent before half of the microbatches under way are back."""
        most = 1 if keeps_one or self._has_states else self._most(running)
        if under_way <= (most + 1) // 2:
            self._is_filling = True
        elif under_way > most:
            self._is_filling = False
        return most if self._is_filling and self._times.lookahead_pays else 0

    def _most(self, running: Iterable[Sequence]) -> int:
        """Several where steps have all rows: none awaits its first token, or needs others to choose one."""
        have_all = all(sequence.samples_plainly and sequence.phase is Phase.DECODE for sequence in running)
        return self._times.steps_ahead if have_all else 1

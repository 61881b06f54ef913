"""The number of microbatches that decoding sequences are split into, so that stages work at the same time.

Every microbatch reads all weights once, so two microbatches of n / 2 sequences take each stage longer than one of n:
they pay only if the stages would otherwise wait for each other. With stage times t_i(rows) and `transit` for links and
coordinator, each sequence gets a token once in

    cycle(groups) = max(sum_i t_i(n / groups) + transit,  groups * max_i t_i(n / groups))

the time of one microbatch through all stages, or the slowest stage's time for all of them, whichever is longer.
"""

from __future__ import annotations

from llamaclust.cluster.scheduler.stage_times import StageTimes

_MARGIN = 0.05
"""The predicted gain that a measured split needs to be tried again; a running or unmeasured one needs none."""

_DECIDE_EVERY = 16
_RETRY_EVERY = 4096
"""Numbers of decode microbatches between decisions, and between fresh measurements of splits."""


def cycle_ns(stage_ns: list[float], groups: int, transit_ns: float) -> float:
    return max(sum(stage_ns) + transit_ns, groups * max(stage_ns))


def predicted_cycle_ns(times: StageTimes, sequences: int, groups: int) -> float | None:
    """Returns None without measurements: one group's and several groups' differ, as stages share cores and memory."""
    own, other = (times.alone, times.beside) if groups == 1 else (times.beside, times.alone)
    stage_ns = own.predict(-(-sequences // groups), other)
    if stage_ns is None:
        return None
    return cycle_ns(stage_ns, groups, times.transit_ns if groups == 1 else times.whole_transit_ns)


class DecodeSplit:
    """The number of groups, decided anew for another number of sequences and every `_DECIDE_EVERY` microbatches."""

    def __init__(self, times: StageTimes) -> None:
        self._times = times
        self._sequences = 0
        self._groups = 1
        self._launched = 0

    def launched(self) -> None:
        self._launched += 1
        if self._launched % _RETRY_EVERY == 0 and self._groups == 1:
            self._times.forget_beside()

    def groups(self, sequences: int) -> int:
        if sequences <= 1:
            return 1
        if sequences != self._sequences or self._launched % _DECIDE_EVERY == 0:
            self._sequences = sequences
            self._groups = self._best(sequences)
        return self._groups

    def rows(self, decoding: int, under_way: int) -> int:
        """Returns 0 while all groups are in flight: ready sequences then join a group that comes back."""
        groups = self.groups(decoding)
        return 0 if under_way >= groups else -(-decoding // groups)

    def _best(self, sequences: int) -> int:
        best, best_ns = 1, predicted_cycle_ns(self._times, sequences, 1)
        if best_ns is None:
            return 1
        if self._groups == 1 and self._times.beside.predict(1) is not None:
            best_ns *= 1 - _MARGIN
        for groups in range(2, min(self._times.in_flight, sequences) + 1):
            ns = predicted_cycle_ns(self._times, sequences, groups)
            if ns is not None and ns < best_ns:
                best, best_ns = groups, ns
        return best

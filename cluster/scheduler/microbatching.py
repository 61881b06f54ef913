"""Decides into how many microbatches, called groups, the decoding sequences are split. Several groups let stages work
at the same time, but each stage reads all of its weights for each group.

Each sequence gets one token per cycle(groups) = max(sum_i t_i(n / groups) + transit, groups * max_i t_i(n / groups)),
where t_i(rows) is the time of stage i, and `transit` the time on links and in the coordinator."""

from __future__ import annotations

from llamaclust.cluster.scheduler.stage_times import StageTimes

_MARGIN = 0.05

_DECIDE_EVERY = 16
_RETRY_EVERY = 4096
"""Number of decode microbatches after which several groups are tried again, if only one group is used."""


def cycle_ns(stage_ns: list[float], groups: int, transit_ns: float) -> float:
    return max(sum(stage_ns) + transit_ns, groups * max(stage_ns))


def predicted_cycle_ns(times: StageTimes, sequences: int, groups: int) -> float | None:
    own, other = (times.alone, times.beside) if groups == 1 else (times.beside, times.alone)
    stage_ns = own.predict(-(-sequences // groups), other)
    if stage_ns is None:
        return None
    return cycle_ns(stage_ns, groups, times.transit_ns if groups == 1 else times.whole_transit_ns)


class DecodeSplit:
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
        """Returns the number of sequences in the next decode microbatch, or 0 if all groups are in flight."""
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

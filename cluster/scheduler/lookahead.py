"""Decides how many lookahead steps are sent. A lookahead step is a decode step whose input tokens are not known yet.

Stages compute lookahead steps while results travel. A worker that holds the whole model gets several short steps
together and answers them together. Coordinator and worker then wake up only once, and leave the cores to
computation."""

from __future__ import annotations

from llamaclust.cluster.scheduler.stage_times import StageTimes

_WORTH_HIDING = 0.02
"""The least share of a step's time in links and coordinator at which lookahead pays. Lookahead delays new requests."""

_MOST_NS = 20e6
"""The most nanoseconds of lookahead steps in flight. New requests wait for them, and an answer's end wastes them."""

_SHORTEST_NS = 1e6


class Lookahead:
    def __init__(self, times: StageTimes, *, has_states: bool) -> None:
        self._times = times
        self._has_states = has_states  # the states of rows that others follow are kept for one step
        self._is_filling = False  # steps are sent until there are enough

    @property
    def most_steps(self) -> int:
        """The most lookahead steps in flight: 1 with several stages, with states, or before times are measured."""
        decode_ns = self._times.decode_ns
        if decode_ns is None or self._times.stages > 1 or self._has_states:
            return 1
        return max(1, int(_MOST_NS / max(decode_ns, _SHORTEST_NS)))

    @property
    def _pays(self) -> bool:
        decode_ns = self._times.decode_ns
        return decode_ns is not None and self._times.whole_transit_ns > _WORTH_HIDING * decode_ns

    def steps(self, under_way: int, *, several: bool) -> int:
        """Returns how many unknown tokens may precede the next step, or 0 to send no step. If `several` is set, steps
        are sent until `most_steps` are in flight, and again after half of them have returned."""
        most = self.most_steps if several else 1
        if under_way <= (most + 1) // 2:
            self._is_filling = True
        elif under_way > most:
            self._is_filling = False
        return most if self._is_filling and self._pays else 0

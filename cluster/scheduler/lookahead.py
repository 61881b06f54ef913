"""How many steps are sent before the tokens that they follow are known.

Stages compute them while results travel. A worker that holds the whole model computes them one after the other, so
where steps are short, several are sent and answered together: coordinator and worker are awake once for all of them,
and take less of the cores that compute.
"""

from __future__ import annotations

from llamaclust.cluster.scheduler.stage_times import StageTimes

_WORTH_HIDING = 0.02
"""Of a step: a smaller share for links and coordinator does not justify lookahead steps, which delay new requests."""

_MOST_NS = 20e6
"""Of steps under way: a new request may wait so long for them, and an answer's end waste them."""

_SHORTEST_NS = 1e6


class Lookahead:
    """Steps under way are refilled together, when half of them are back."""

    def __init__(self, times: StageTimes, *, has_states: bool) -> None:
        self._times = times
        self._has_states = has_states  # the states of rows that others follow are kept for one step
        self._is_filling = False  # steps are sent until there are enough

    @property
    def most_steps(self) -> int:
        """That a whole model may have under way; between stages, results travel meanwhile."""
        decode_ns = self._times.decode_ns
        if decode_ns is None or self._times.stages > 1 or self._has_states:
            return 1
        return max(1, int(_MOST_NS / max(decode_ns, _SHORTEST_NS)))

    @property
    def _pays(self) -> bool:
        decode_ns = self._times.decode_ns
        return decode_ns is not None and self._times.whole_transit_ns > _WORTH_HIDING * decode_ns

    def steps(self, under_way: int, *, several: bool) -> int:
        """How many unknown tokens a step may follow now, 0 where none is to be sent; one at most without `several`."""
        most = self.most_steps if several else 1
        if under_way <= (most + 1) // 2:
            self._is_filling = True
        elif under_way > most:
            self._is_filling = False
        return most if self._is_filling and self._pays else 0

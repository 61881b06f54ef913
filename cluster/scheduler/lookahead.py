"""Decides how many lookahead steps are sent. A lookahead step is a decode step that is sent before its input tokens are
known. Stages compute it while results are on their way to the coordinator."""

from __future__ import annotations

from llamaclust.cluster.scheduler.stage_times import StageTimes

_WORTH_HIDING = 0.02
"""Lookahead is used if links and the coordinator take more than this share of the stages' time."""

_MOST_NS = 20e6
"""Maximum total nanoseconds of lookahead steps in flight, for which new requests wait."""

_SHORTEST_NS = 1e6


class Lookahead:
    def __init__(self, times: StageTimes, *, has_states: bool) -> None:
        self._times = times
        # True if layers keep a state per sequence. Only one lookahead step may then be in flight.
        self._has_states = has_states
        self._is_filling = False  # True while steps are being sent until the maximum is reached.

    @property
    def most_steps(self) -> int:
        """Maximum number of steps in flight. It is 1 with several stages, recurrent states or unmeasured times."""
        decode_ns = self._times.decode_ns
        if decode_ns is None or self._times.stages > 1 or self._has_states:
            return 1
        return max(1, int(_MOST_NS / max(decode_ns, _SHORTEST_NS)))

    @property
    def _pays(self) -> bool:
        decode_ns = self._times.decode_ns
        return decode_ns is not None and self._times.whole_transit_ns > _WORTH_HIDING * decode_ns

    def steps(self, under_way: int, *, several: bool) -> int:
        """Returns how many tokens of a sequence may be unknown when its next step is sent, or 0 to send no step.
        `under_way` is the number of steps in flight. If `several` is false, the result is at most 1."""
        most = self.most_steps if several else 1
        if under_way <= (most + 1) // 2:
            self._is_filling = True
        elif under_way > most:
            self._is_filling = False
        return most if self._is_filling and self._pays else 0

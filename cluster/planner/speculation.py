"""Predicts the gain of speculation at a given acceptance rate, with the window sizes that the scheduler would use."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llamaclust.cluster.planner.plan import Prediction
from llamaclust.cluster.scheduler.speculation.candidates import LONGEST_DRAFT, Candidate
from llamaclust.cluster.scheduler.speculation.windows import best_chain, best_windows, speed_of

USUAL_ACCEPTANCES = (0.5, 0.8, 0.95)


@dataclass(frozen=True, slots=True)
class SpeculationGain:
    acceptance: float  # Probability that a drafted token is right if all before it are right.
    drafted_tokens: int  # Drafted tokens per window. 0: drafts gain nothing.
    gain: float  # Tokens per second, divided by the tokens per second without drafts.
    tokens_per_s: float


def predict_gain(prediction: Prediction, acceptance: float) -> SpeculationGain | None:
    if not prediction.rounds:
        return None
    times = _PlannedRounds(prediction)
    most = prediction.rounds[-1].drafted
    candidate = Candidate((0,) * most, acceptance)
    (window,) = best_windows((candidate,), times, 1, most)
    plain_ns = times.plain_ns(1, 1)
    if not window:
        return SpeculationGain(acceptance, 0, 1.0, 1e9 / plain_ns)
    speed = speed_of((candidate,), (window,), times, 1)
    chain = best_chain(acceptance, LONGEST_DRAFT, times, most)
    if chain is not None and chain.speed > speed:
        window, speed = chain.window, chain.speed
    return SpeculationGain(acceptance, window, speed * plain_ns, speed * 1e9)


class _PlannedRounds:
    """Predicted round times for one sequence. Times between the predicted window sizes are interpolated."""

    def __init__(self, prediction: Prediction) -> None:
        self._plain_s = prediction.token_s
        self._rows = [1 + each.drafted for each in prediction.rounds]
        self._seconds = [each.seconds for each in prediction.rounds]
        self._slowest_s = [each.slowest_s for each in prediction.rounds]

    def plain_ns(self, sequences: int, groups: int) -> float:
        assert sequences == groups == 1
        return _ns(self._plain_s)

    def window_ns(self, rows: int, groups: int) -> float:
        assert groups == 1
        return _ns(float(np.interp(rows, self._rows, self._seconds)))

    def slowest_ns(self, rows: int) -> float:
        return _ns(float(np.interp(rows, self._rows, self._slowest_s)))


def _ns(seconds: float) -> float:
    return max(1e9 * seconds, 1.0)

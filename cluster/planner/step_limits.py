"""Calculates the time limit of a step. A worker that exceeds the limit counts as hung."""

from __future__ import annotations

from collections.abc import Sequence

from llamaclust.cluster.planner.links import Link
from llamaclust.cluster.planner.plan import StagePrediction

UNPREDICTED_S = 30.0
_LEAST_S = 4.0
"""Minimum limit in seconds. With the heartbeat interval added, a hang is found within five seconds."""
_TIMES_PREDICTED = 10.0
_RULE = f"{_TIMES_PREDICTED:g} times its predicted time, at least {_LEAST_S:g} s"


def step_limit_s(rows: int, measured_s: Sequence[float], planned: Sequence[StagePrediction]) -> float:
    """Returns a step's time limit: ten times the longest known time, but at least 4 s, or 30 s if none is known."""
    if rows == 0:
        return UNPREDICTED_S
    predicted_s = [*measured_s, *(max(stage.decode_s, rows * stage.prefill_s) for stage in planned)]
    return max(_LEAST_S, _TIMES_PREDICTED * max(predicted_s)) if predicted_s else UNPREDICTED_S


def link_limit_s(link: Link, message_bytes: int) -> float:
    return _TIMES_PREDICTED * (link.one_way_s + message_bytes * link.byte_s)


def silence_text(number: int, waited_s: float, limit_s: float) -> str:
    rule = f"the limit of {limit_s:.3g} s for its step and transfers"
    return f"it does not answer: microbatch {number} has taken {waited_s:.1f} s, longer than {rule}"


def hang_text(computing_s: float, limit_s: float) -> str:
    return f"it hangs: a step has been computed for {computing_s:.1f} s, longer than {limit_s:.3g} s ({_RULE})"

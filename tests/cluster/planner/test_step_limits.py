"""Tests how long a step may take, by what was predicted or measured, and by its rows."""

from __future__ import annotations

from llamaclust.cluster.planner.plan import StagePrediction
from llamaclust.cluster.planner.step_limits import step_limit_s

PLANNED = (StagePrediction(decode_s=1.0, prefill_s=0.04),)


def test_a_step_may_take_ten_times_its_longest_prediction() -> None:
    assert step_limit_s(1, (), PLANNED) == 10.0, "decode"
    assert step_limit_s(50, (), PLANNED) == 20.0, "50 rows of a prompt"
    assert step_limit_s(50, (0.5, 3.0), PLANNED) == step_limit_s(50, (0.5, 3.0), ()) == 30.0, "as measured"


def test_a_short_step_may_take_four_seconds_and_one_without_prediction_thirty() -> None:
    assert step_limit_s(1, (0.001,), ()) == 4.0
    assert step_limit_s(50, (), ()) == step_limit_s(0, (3.0,), PLANNED) == 30.0


def test_the_slowest_member_of_a_group_counts() -> None:
    slower = StagePrediction(decode_s=2.0, prefill_s=0.1)
    assert step_limit_s(1, (), (*PLANNED, slower)) == step_limit_s(1, (), (slower, *PLANNED)) == 20.0

"""Tests of the shares of a group's members."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from llamaclust.cluster.planner.format import shares_text
from llamaclust.cluster.planner.groups.divided_costs import DividedTables
from llamaclust.cluster.planner.groups.shares import balanced


@pytest.mark.parametrize("whole_s", [1e-6, 0.24, 1e3])
@pytest.mark.parametrize("speeds", [(1.0, 1.0), (1.0, 3.0), (1.0, 1.0, 5.0)])
def test_shares_are_whole_where_all_is_divided_in_few_units(whole_s: float, speeds: tuple[float, ...]) -> None:
    """All parts of a small model are divided in few units, and memory is ample."""
    zeros = np.zeros((len(speeds), 1))
    seconds = DividedTables(zeros + whole_s, (np.array([[0.1 / speed] for speed in speeds]),), zeros)
    lacking = DividedTables(zeros - 1e10, (zeros + 1e5,), zeros)
    parts: Any = SimpleNamespace(
        coarse=((8, None),), least_units=64, coarse_parts=lambda shares: [np.round(shares * 8) / 8]
    )
    assert balanced(parts, seconds, lacking).sum(axis=0) == pytest.approx(1.0, abs=1e-7)


@pytest.mark.parametrize(
    ("shares", "shown"),
    [
        ((1, 1), "1:1"),
        ((2, 1, 1), "2:1:1"),
        ((11, 12, 11), "11:12:11"),
        ((317, 349, 334), "1:1.1:1.05"),
        ((334, 333, 333), "1:1:1"),
        ((24, 12), "2:1"),
        ((700, 200, 100), "7:2:1"),
        ((667, 333), "2:1"),
        ((130, 1), "130:1"),
    ],
)
def test_shares_are_shown_as_ratios_of_small_numbers(shares: tuple[int, ...], shown: str) -> None:
    assert shares_text(shares) == shown

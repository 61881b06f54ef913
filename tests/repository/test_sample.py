"""`--sample N`: CI runs other cases each time, and never leaves out a test."""

from __future__ import annotations

import pytest

from support.sample import sampled

NODES = ["a.py::test_one", *(f"a.py::test_many[{case}-x]" for case in range(10)), "b.py::test_many[0]"]


def test_of_each_test_a_part_of_the_cases() -> None:
    for seed in range(20):
        kept = sampled(NODES, 4, seed)
        assert kept == sampled(NODES, 4, seed)
        assert {"a.py::test_one", "b.py::test_many[0]"} < kept
        assert len(kept) == 2 + 3


def test_seeds_reach_all_cases() -> None:
    assert set().union(*(sampled(NODES, 4, seed) for seed in range(60))) == set(NODES)


@pytest.mark.parametrize("one_in", [0, -3])
def test_no_part_at_all_is_refused(one_in: int) -> None:
    with pytest.raises(pytest.UsageError, match="1 or more"):
        sampled(NODES, one_in, 1)

"""Tests of pauses between attempts."""

from __future__ import annotations

from llamaclust.core.backoff import Backoff


def test_pauses_grow_by_the_factor_up_to_the_maximum() -> None:
    assert [Backoff(0.1, 5.0).pause_s(failures) for failures in (0, 1, 2, 5000)] == [0.1, 0.2, 0.4, 5.0]
    assert [Backoff(1.0, 2.0, factor=1.5).pause_s(failures) for failures in range(3)] == [1.0, 1.5, 2.0]


def test_thousands_of_failures_do_not_overflow() -> None:
    assert Backoff(1e-9, 600.0).pause_s(1 << 40) == 600.0

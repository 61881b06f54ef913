"""Tests of Ollama's field `keep_alive`."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from math import inf

import pytest

from llamaclust.cluster.front.errors import HttpError
from llamaclust.cluster.front.settings import read_keep_alive


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (0, 0.0),
        (2.5, 2.5),
        ("300", 300.0),
        ("1h30m", 5400.0),
        ("250ms", 0.25),
        (-1, inf),
        ("-1m", inf),
        (-0.5, inf),
    ],
)
def test_seconds_and_durations(value: object, seconds: float) -> None:
    assert read_keep_alive(value) == pytest.approx(seconds)
    assert read_keep_alive(None) is None


@pytest.mark.parametrize("value", [1e12, 10**400, -(10**400), "99999999h", "999999999999", 1_000_000_001])
def test_more_than_a_lifetime_is_for_ever(value: object) -> None:
    assert read_keep_alive(value) == inf


def test_the_longest_time_has_an_end() -> None:
    seconds = read_keep_alive(1e9)
    assert seconds is not None and datetime.now(UTC) + timedelta(seconds=seconds) > datetime.now(UTC)


@pytest.mark.parametrize("value", ["soon", "5 m", "", True, [1], float("nan"), float("inf"), "1" * 65])
def test_what_is_no_duration_is_refused(value: object) -> None:
    with pytest.raises(HttpError, match="is not a duration"):
        read_keep_alive(value)

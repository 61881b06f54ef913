"""Ollama's field `keep_alive`."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

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
        (-1, None),
        ("-1m", None),
        (-0.5, None),
    ],
)
def test_seconds_and_durations(value: object, seconds: float | None) -> None:
    found = read_keep_alive({"keep_alive": value})
    assert found is not None and found.seconds == pytest.approx(seconds)
    assert read_keep_alive({}) is None


@pytest.mark.parametrize("value", [1e12, 10**400, -(10**400), "99999999h", "999999999999", 1_000_000_001])
def test_more_than_a_lifetime_is_for_ever(value: object) -> None:
    found = read_keep_alive({"keep_alive": value})
    assert found is not None and found.seconds is None


def test_the_longest_time_has_an_end() -> None:
    found = read_keep_alive({"keep_alive": 1e9})
    assert found is not None and found.seconds is not None
    assert datetime.now(UTC) + timedelta(seconds=found.seconds) > datetime.now(UTC)


@pytest.mark.parametrize("value", ["soon", "5 m", "", True, [1], float("nan"), float("inf"), "1" * 65])
def test_what_is_no_duration_is_refused(value: object) -> None:
    with pytest.raises(HttpError, match="is no duration"):
        read_keep_alive({"keep_alive": value})

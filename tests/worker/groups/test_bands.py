"""Tests of the choice of the number of bands: it minimizes the time that gathers wait, and follows the network."""

from __future__ import annotations

import pytest

from llamaclust.worker.groups.bands import BandChoice


def numbers(choice: BandChoice, waited: dict[int, float], rows: int = 512, runs: int = 40) -> list[int]:
    """Returns the number of bands in each run."""
    found = []
    for _ in range(runs):
        found.append(choice.of(rows))
        choice.add(rows, waited[found[-1]])
    return found


@pytest.mark.parametrize(
    ("rows", "waited", "bands"),
    [
        (512, {1: 0.30, 2: 0.02, 3: 0.01, 4: 0.0}, 2),  # two bands hide almost all waits
        (512, {1: 0.40, 2: 0.09, 3: 0.02, 4: 0.0}, 3),
        (512, {1: 0.60, 2: 0.30, 3: 0.24, 4: 0.20}, 4),  # the network dominates
        (512, {1: 0.10, 2: 0.10, 3: 0.10, 4: 0.10}, 2),  # a slower member: more bands hide nothing
        (512, {1: 0.005, 2: 0.003, 3: 0.0, 4: 0.0}, 1),  # nothing to hide
        (512, {1: 0.06, 2: 0.003, 3: 0.0, 4: 0.0}, 2),
        (80, {1: 0.06, 2: 0.0}, 1),  # less than reading the weights again takes
        (80, {1: 0.25, 2: 0.08}, 2),
        (200, {1: 0.25, 2: 0.18, 3: 0.12, 4: 0.05}, 4),
    ],
)
def test_the_number_of_the_least_time(rows: int, waited: dict[int, float], bands: int) -> None:
    assert numbers(BandChoice(), waited, rows)[20:] == [bands] * 20


def test_another_network() -> None:
    choice = BandChoice()
    slow, fast = {1: 0.6, 2: 0.3, 3: 0.2, 4: 0.1}, {1: 0.004, 2: 0.002, 3: 0.0, 4: 0.0}
    for waited, bands in ((slow, 4), (fast, 1), (slow, 4)):
        assert set(numbers(choice, waited, runs=200)[-20:]) == {bands}


def test_few_rows_have_one_band_and_say_nothing_of_more() -> None:
    choice = BandChoice()
    assert numbers(choice, {1: 0.9}, rows=63) == [1] * 40
    assert numbers(choice, {1: 0.9, 2: 0.9, 3: 0.5, 4: 0.1}, rows=1000)[-1] == 4
    assert (choice.of(63), choice.of(64), choice.of(256), choice.of(512)) == (1, 1, 2, 4)

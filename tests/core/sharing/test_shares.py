"""Tests of shares: a single owner may hold all units, and a new owner may take half of the free units."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest

from llamaclust.core.sharing.shares import Shares, fits
from support.seed import SEED


@pytest.mark.parametrize("room", [2, 7, 100])
def test_shares_are_bounded_and_a_newcomer_finds_some(room: int) -> None:
    print(f"seed {SEED}")
    source, held = Random(SEED), Counter[str]()
    for _ in range(50 * room):
        owner = source.choice("aaaaaabbc")
        if fits(held[owner], held.total(), room):
            held[owner] += 1
        elif held[owner] and source.random() < 0.1:
            held[owner] -= 1
        assert held.total() <= 2 * room and max(held.values()) <= room
        assert fits(0, held.total(), room) or held.total() >= 2 * room - 1


def test_one_alone_has_all_of_it() -> None:
    assert [fits(own, own, 3) for own in range(5)] == [True, True, True, False, False]
    assert fits(0, 0, 10, 10) and not fits(0, 0, 10, 11) and fits(4, 4, 10, 6) and not fits(4, 4, 10, 7)


@pytest.mark.parametrize("room", [7, 100, 1 << 21])
@pytest.mark.parametrize("largest", [0.01, 0.5, 1.0])
def test_takes_of_any_size_leave_a_newcomer_half_of_what_is_free(room: int, largest: float) -> None:
    print(f"seed {SEED}")
    source, held = Random(SEED), Counter[str]()
    for _ in range(3000):
        owner, more = source.choice("aaaaaabbc"), source.randint(1, max(1, int(largest * room)))
        if fits(held[owner], held.total(), room, more):
            held[owner] += more
        elif source.random() < 0.1:
            held[owner] = 0
        assert held.total() <= 2 * room and max(held.values()) <= room
        free = 2 * room - held.total()
        half = -(-free // 2)
        assert fits(0, held.total(), room, half)
        assert not fits(0, held.total(), room, half + 1)


@pytest.mark.parametrize("room", [2, 40, 1 << 21])
def test_owners_that_take_all_they_can_leave_some_to_others(room: int) -> None:
    """The first owner may take `room` units. Each further owner may take half of the rest."""
    taken = list[int]()
    while sum(taken) < 2 * room:
        sizes = (room >> shift for shift in range(room.bit_length()))
        taken.append(next(more for more in sizes if fits(0, sum(taken), room, more)))
    assert taken[:2] == [room, room // 2] and len(taken) >= room.bit_length()


def test_nothing_more_fits_always() -> None:
    assert fits(7, 14, 7, 0) and fits(9, 20, 7, 0)


def test_what_is_held_meanwhile_is_given_back_whatever_happens() -> None:
    shares = Shares(7)
    with shares.holding("a", 3), pytest.raises(ZeroDivisionError), shares.holding("a", 4):
        assert shares.held == {"a": 7} and not shares.fits("a") and shares.fits("b", 4) and not shares.fits("b", 5)
        raise ZeroDivisionError
    assert not shares.held

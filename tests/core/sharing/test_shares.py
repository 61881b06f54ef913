"""Shares of room: one owner alone has all, several less than twice as much, and none keeps a newcomer out."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest

from llamaclust.core.sharing.shares import fits
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

"""Tests of the queue of requests that wait for a resource. Only the first request may take from it."""

from __future__ import annotations

import asyncio
from collections import Counter

from llamaclust.core.sharing.line import Line, Place


async def _enter(place: Place, order: list[str]) -> None:
    await place.enter()
    order.append(place.owner)


async def test_the_next_one_is_that_whose_owner_holds_least_and_then_the_oldest() -> None:
    held, order = Counter({"a": 5}), list[str]()
    line = Line(held)
    names = ["a", "b", "c", "b"]
    first, *others = places = [line.place(name) for name in names]
    assert first.is_open and not line.is_busy
    tasks = [asyncio.create_task(_enter(place, order)) for place in places]
    await asyncio.sleep(0)
    assert order == ["a"] and first.is_first and not any(place.is_open for place in others)
    held["b"] = 1  # The next owner is chosen by what the owners hold now.
    for number in range(1, 4):
        present = next(place for place in places if place.is_first)
        with present:
            pass
        await asyncio.sleep(0)
        assert len(order) == 1 + number
    assert order == ["a", "c", "b", "b"]
    await asyncio.gather(*tasks)


async def test_one_that_leaves_is_not_called() -> None:
    line, order = Line(Counter()), list[str]()
    first, second, third = (line.place(name) for name in "abc")
    with first, third:
        await first.enter()
        with second:
            waiting = asyncio.create_task(second.enter())
            last = asyncio.create_task(_enter(third, order))
            await asyncio.sleep(0)
            waiting.cancel()
        assert not order
        with first:
            pass
        await last
        assert third.is_first and order == ["c"]
    assert not line.is_busy

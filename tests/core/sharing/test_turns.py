"""Tests of fair turns: an owner with much work does not delay other owners."""

from __future__ import annotations

import asyncio
from asyncio import sleep

import pytest

from llamaclust.core.sharing.turns import Turns


async def _work(turns: Turns, owner: str, order: list[str]) -> None:
    async with turns.turn(owner):
        order.append(owner)
        await sleep(0)
        await sleep(0)


async def test_an_owner_with_much_work_delays_its_own_alone() -> None:
    turns, order = Turns(2), list[str]()
    async with asyncio.TaskGroup() as group:
        for owner in "aaaaaabbc":
            group.create_task(_work(turns, owner, order))
    assert order[:2] == ["a", "a"] and sorted(order) == list("aaaaaabbc")
    assert order[2:5] == ["b", "c", "a"] and "b" in order[5:7]


async def test_a_single_owner_has_all_places() -> None:
    turns, order = Turns(2), list[str]()
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(_work(turns, "a", order)) for _ in range(3)]
        await sleep(0)
        assert order == ["a", "a"] and not any(task.done() for task in tasks)
    assert order == ["a", "a", "a"]


@pytest.mark.parametrize(("places", "most"), [(2, 1), (3, 2), (5, 1)])
async def test_an_owner_at_its_most_leaves_places_free_for_others(places: int, most: int) -> None:
    turns, order = Turns(places, most), list[str]()
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(_work(turns, "a", order)) for _ in range(3 * places)]
        await sleep(0)
        assert order == ["a"] * most and not any(task.done() for task in tasks)
        group.create_task(_work(turns, "b", order))
        await sleep(0)
        assert order == ["a"] * most + ["b"]
    assert sorted(order) == ["a"] * 3 * places + ["b"]
    assert turns._free == places and not turns._waiting and not turns._taken


async def test_work_that_is_cancelled_keeps_no_place() -> None:
    """Work is cancelled while it waits, during its turn, and when its turn begins."""
    turns, order = Turns(1), list[str]()
    for steps in range(8):
        tasks = [asyncio.create_task(_work(turns, owner, order)) for owner in "abca"]
        for _ in range(steps):
            await sleep(0)
        for task in tasks[:3]:
            task.cancel()
        await asyncio.wait(tasks, timeout=30)
        assert tasks[3].done() and not tasks[3].cancelled()
    assert turns._free == 1 and not turns._waiting and not turns._taken

"""Tests of computations that several callers share. Each caller has its own turn and deadline."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass, field

import pytest

from llamaclust.core.sharing.computations import Lease, Owners, SharedComputations
from llamaclust.core.sharing.turns import Turns


@dataclass
class Work:
    """Starts shared computations that wait for the event of their key in `gates`."""

    turns: Turns = field(default_factory=lambda: Turns(sys.maxsize, 1))
    begun: list[tuple[str, tuple[str, ...]]] = field(default_factory=list)  # (key, owners at the start)
    cancelled: list[str] = field(default_factory=list)
    closed: list[str] = field(default_factory=list)
    failure: Exception | None = None
    gates: dict[str, asyncio.Event] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.shared = SharedComputations[str](lambda key, value: self.closed.append(value))

    async def take(self, key: str, owner: str, timeout: asyncio.Timeout | None = None) -> Lease[str]:
        async def compute(owners: Owners) -> str:
            self.begun.append((key, (*owners,)))
            try:
                await self.gates.setdefault(key, asyncio.Event()).wait()
            except asyncio.CancelledError:
                self.cancelled.append(key)
                raise
            if self.failure is not None:
                raise self.failure
            return key

        @asynccontextmanager
        async def turn() -> AsyncIterator[None]:
            async with timeout or nullcontext(), self.turns.turn(owner):
                yield

        return await self.shared.take(key.encode(), owner, turn(), compute)

    def start(self, key: str, owner: str, timeout: asyncio.Timeout | None = None) -> asyncio.Task[Lease[str]]:
        return asyncio.create_task(self.take(key, owner, timeout))

    def let_go(self, *keys: str) -> None:
        for key in keys:
            self.gates.setdefault(key, asyncio.Event()).set()


async def passes() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def test_a_computation_begins_in_the_first_turn_of_any_caller() -> None:
    work = Work()
    busy, waits = work.start("x", "a"), work.start("y", "a")
    await passes()
    assert work.begun == [("x", ("a",))], "one at a time of an owner"
    other = work.start("y", "b")
    await passes()
    assert work.begun[1:] == [("y", ("b", "a"))], "b does not wait for x"
    work.let_go("y")
    assert (await other).value == (await waits).value == "y" and not busy.done()
    work.let_go("x")
    assert (await busy).value == "x" and len(work.begun) == 2


@pytest.mark.parametrize("late", ["a", "b"])
async def test_the_deadline_of_one_caller_is_not_that_of_others(late: str) -> None:
    work, timeouts = Work(), {owner: asyncio.timeout(None) for owner in "ab"}
    waiting = {}
    for owner, timeout in timeouts.items():
        waiting[owner] = work.start("x", owner, timeout)
        await passes()
    timeouts[late].reschedule(0.0)
    with pytest.raises(TimeoutError):
        await waiting.pop(late)
    await passes()
    ((other, task),) = waiting.items()
    assert not task.done() and not work.cancelled
    free = work.start("y", late)
    await passes()
    assert [key for key, _ in work.begun] == ["x", "y"], "its turn is over"
    work.let_go("x", "y")
    assert (await task).value == "x" and (await free).value == "y" and other != late


async def test_it_ends_when_no_caller_is_left() -> None:
    work = Work()
    tasks = [work.start("x", owner) for owner in "ab"]
    await passes()
    tasks[0].cancel()
    await passes()
    assert not work.cancelled and b"x" in work.shared
    tasks[1].cancel()
    await passes()
    assert work.cancelled == ["x"] and b"x" not in work.shared and not work.closed
    again = work.start("x", "a")
    work.let_go("x")
    assert (await again).value == "x" and len(work.begun) == 2


async def test_a_value_is_closed_when_no_caller_uses_it() -> None:
    work = Work()
    work.let_go("x")
    first = await work.take("x", "a")
    second = await work.take("x", "b")
    assert len(work.begun) == 1
    first.release()
    first.release()
    assert not work.closed
    second.release()
    assert work.closed == ["x"] and b"x" not in work.shared
    known = work.shared.put(b"x", "a", "known")
    assert (await work.take("x", "b")).value == "known" and len(work.begun) == 1
    known.release()
    assert work.closed == ["x"]


async def test_a_value_that_comes_when_its_last_caller_leaves_is_closed() -> None:
    work = Work()
    task = work.start("x", "a")
    await passes()
    work.let_go("x")
    while not work.shared._shared[b"x"].result.done():  # noqa: ASYNC110  few turns
        await asyncio.sleep(0)
    task.cancel()
    await passes()
    assert task.cancelled() and work.closed == ["x"] and b"x" not in work.shared


async def test_an_error_is_that_of_all_who_wait_and_of_nobody_later() -> None:
    work = Work(failure=ValueError("no"))
    tasks = [work.start("x", owner) for owner in "aab"]
    await passes()
    work.let_go("x")
    assert [str(error) for error in await asyncio.gather(*tasks, return_exceptions=True)] == ["no"] * 3
    work.failure = None
    assert (await work.take("x", "c")).value == "x" and len(work.begun) == 2 and not work.closed

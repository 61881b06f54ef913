"""Who is left out of plans, and for how long."""

from __future__ import annotations

import asyncio

import pytest

from llamaclust.cluster.control import quarantine
from llamaclust.cluster.control.quarantine import LeftOut


async def test_twice_as_long_after_each_failure_and_back_when_the_time_is_over() -> None:
    loop, pauses, changes = asyncio.get_running_loop(), [], asyncio.Event()
    out = LeftOut(changes.set)
    workers = {"a": 1, "b": 2}
    assert out.others(workers) == workers
    for _ in range(12):
        out.add("b")
        assert out.others(workers) == {"a": 1}
        pauses.append(round(out._until_s["b"] - loop.time()))
    assert pauses == [10, 20, 40, 80, 160, 320, *[600] * 6]
    out.forget(["b"])
    assert out.others(workers) == workers
    out.add("b")
    assert round(out._until_s["b"] - loop.time()) == 10


def test_its_end_is_news(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        changed = asyncio.Event()
        out = LeftOut(changed.set)
        out.add("b")
        assert out.others({"b": 1}) == {}
        async with asyncio.timeout(10):
            await changed.wait()
        assert out.others({"b": 1}) == {"b": 1}

    monkeypatch.setattr(quarantine, "_FIRST_S", 0.01)
    asyncio.run(run())

"""Waits for text that are too long: one timer watches many short ones."""

from __future__ import annotations

import asyncio

from llamaclust.cluster.engine.inbox import Inbox
from llamaclust.cluster.text.silence import Silence


async def test_each_wait_that_is_too_long_is_told() -> None:
    inbox: Inbox[int] = Inbox()
    silence = Silence(inbox.wake)
    for _ in range(2):
        silence.begin(0.01)
        async with asyncio.timeout(10):
            while not silence.is_over:
                await inbox.wait()
    inbox.put(1)
    assert await inbox.get() == 1
    silence.end()


async def test_short_waits_set_one_timer() -> None:
    loop = asyncio.get_running_loop()
    set_at: list[float] = []
    plain = loop.call_at

    def counted(when: float, *rest: object, **more: object) -> asyncio.TimerHandle:
        set_at.append(when)
        return plain(when, *rest, **more)  # type: ignore[arg-type]

    loop.call_at = counted  # type: ignore[method-assign]
    silence = Silence(lambda: None)
    for _ in range(100):
        silence.begin(60.0)
        await asyncio.sleep(0)
    silence.end()
    assert len(set_at) == 1


async def test_an_inbox_gives_items_in_order_also_after_a_reader_that_was_cancelled() -> None:
    inbox: Inbox[int] = Inbox()
    reader = asyncio.create_task(inbox.get())
    await asyncio.sleep(0)
    reader.cancel()
    await asyncio.wait([reader])
    inbox.put(1)
    inbox.put(2)
    assert [await inbox.get(), await inbox.get()] == [1, 2]
    later = asyncio.create_task(inbox.get())
    await asyncio.sleep(0)
    inbox.wake()
    await asyncio.sleep(0)
    inbox.put(3)
    async with asyncio.timeout(10):
        assert await later == 3

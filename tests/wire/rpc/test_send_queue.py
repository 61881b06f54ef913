"""Tests of send queues: messages are sent in order and in time, or the failure is reported."""

from __future__ import annotations

import asyncio

import pytest

from llamaclust.core.errors import DeadlineError
from llamaclust.wire.rpc.deadlines import recurring_deadline
from llamaclust.wire.rpc.send_queue import SendQueue


class Slow:
    """A stream that accepts one message for each release of `lets`."""

    def __init__(self) -> None:
        self.taken: list[bytes] = []
        self.lets = asyncio.Semaphore(0)
        self.all_taken = asyncio.Event()

    def try_write(self, *messages: bytes) -> bool:
        return False

    async def write(self, *messages: bytes) -> None:
        await self.lets.acquire()
        self.taken += messages
        if len(self.taken) == 9:
            self.all_taken.set()


async def test_messages_go_out_in_order_without_waiting() -> None:
    stream = Slow()
    box = SendQueue(stream, "a message", 5.0)
    box.put(b"0")  # The sender does not run yet.
    running = asyncio.create_task(box.run())
    for number in range(1, 9):
        box.put(b"%d" % number)
        stream.lets.release()
        await asyncio.sleep(0)
    stream.lets.release()
    async with asyncio.timeout(60):
        await stream.all_taken.wait()
    assert stream.taken == [b"%d" % number for number in range(9)]
    running.cancel()


class Quick(Slow):
    """A stream that accepts most messages at once."""

    def try_write(self, *messages: bytes) -> bool:
        if {b"2", b"3", b"7"}.intersection(messages):
            return False
        self.taken += messages
        return True


async def test_messages_that_are_taken_at_once_do_not_overtake_others() -> None:
    stream = Quick()
    box = SendQueue(stream, "a message", 5.0)
    running = asyncio.create_task(box.run())
    for number in range(9):
        box.put(b"%d" % number)
        await asyncio.sleep(0)
        if number == 1:
            assert stream.taken == [b"0", b"1"]
        if number > 3:  # Message 2 is being written, and the others wait behind it.
            assert len(stream.taken) == 2
    for _ in range(9):
        stream.lets.release()
    async with asyncio.timeout(60):
        await stream.all_taken.wait()
    assert stream.taken == [b"%d" % number for number in range(9)]
    box.put(b"9")
    assert stream.taken[-1] == b"9"
    running.cancel()


async def test_a_message_that_is_not_taken_is_heard_of_and_waiting_for_one_is_not() -> None:
    stream = Slow()
    box = SendQueue(stream, "a message", 0.05)
    running = asyncio.create_task(box.run())
    await asyncio.wait((running,), timeout=0.2)
    assert not running.done(), "there was nothing to send"
    box.put(b"0")
    with pytest.raises(DeadlineError, match=r"a message took longer than 0\.05 s"):
        async with asyncio.timeout(60):
            await running


async def test_a_recurring_deadline_leaves_other_errors_and_cancellation_alone() -> None:
    with pytest.raises(ValueError, match="mine"):
        async with recurring_deadline("it", 0.05) as limit:
            with limit:
                raise ValueError("mine")

    async def waits() -> None:
        async with recurring_deadline("it", 60.0) as limit:
            with limit:
                await asyncio.Event().wait()

    task = asyncio.create_task(waits())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

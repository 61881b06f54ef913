"""Tests of the end of a membership while some of its work still runs."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import pytest

from llamaclust.core.errors import WorkerError
from llamaclust.wire.control.codec import encode_coordinator_message
from llamaclust.wire.control.messages import Deadlines, LoadFailed, Shutdown, Unload, WorkerMessage
from llamaclust.wire.rpc.task_set import TaskSet
from llamaclust.wire.security.credentials import Insecure
from llamaclust.worker import loads, membership
from llamaclust.worker.loads import Loads
from llamaclust.worker.membership import Member
from llamaclust.worker.service import StageService
from llamaclust.worker.session import Session
from llamaclust.worker.stage.compute import Compute
from llamaclust.worker.stage.counters import Counters
from llamaclust.worker.weights import load
from llamaclust.worker.worker import Worker


class _Stream:
    """A stream that yields messages of a coordinator, then ends."""

    address = "coordinator:1"

    def __init__(self, *messages: bytes) -> None:
        self._messages = [*messages]

    async def read(self) -> bytes | None:
        await asyncio.sleep(0)  # tasks that have begun run
        return self._messages.pop(0) if self._messages else None


@pytest.mark.parametrize("messages", [(Unload(1), Shutdown("done")), (Unload(1),), (Unload(1), Unload(2), Unload(3))])
async def test_tasks_that_do_not_end_are_logged(
    messages: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The tasks are logged in one line, and the loss of the coordinator is still raised."""
    monkeypatch.setattr(membership, "_END_S", 0.05)
    released = asyncio.Event()

    async def stubborn(*_: Any) -> None:
        while not released.is_set():
            with suppress(asyncio.CancelledError):
                await released.wait()

    async def at_once(*_: Any) -> None:
        """Ends at once."""

    monkeypatch.setattr(Loads, "unload", stubborn)
    monkeypatch.setattr(Member, "_send_heartbeats", at_once)
    anything: Any = SimpleNamespace()
    worker = Worker("a", anything, StageService("a"), Compute(), anything, SimpleNamespace(follow=at_once))  # type: ignore[arg-type]
    member = Member(worker, Insecure())
    member._stream = _Stream(*map(encode_coordinator_message, messages))  # type: ignore[assignment]
    try:
        with caplog.at_level(logging.WARNING):
            if isinstance(messages[-1], Shutdown):
                assert await member.serve() == "done"
            else:
                with pytest.raises(WorkerError, match="ended the stream"):
                    await member.serve()
    finally:
        released.set()
        await member._tasks.join()
    unloads = sum(isinstance(message, Unload) for message in messages)
    expected = f"the end of a membership took longer than 0.05 s: {unloads} of its tasks still run"
    assert [record.message for record in caplog.records] == [expected]


def loads_of(send: Callable[[WorkerMessage], Awaitable[None]]) -> tuple[Worker, Loads, Any]:
    """Returns a worker, the loads of a membership, and an order to load a stage."""
    anything: Any = SimpleNamespace(received_bytes=0)
    worker = Worker("a", anything, StageService("a"), Compute(), anything)
    limits = SimpleNamespace(expert_shards=1)
    fields = {"epoch": 1, "model_path": "m.gguf", "model_id": "m", "start": 0, "end": 2, "encoder": None}
    order = SimpleNamespace(**fields, exclusive=False, limits=limits, group=None)
    return worker, Loads(Session(worker, anything, Deadlines(), Counters(), send)), order


@pytest.mark.parametrize("when", ["before the load", "while it loads", "at its end"])
async def test_no_stage_is_added_after_the_end(when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, loaded, closed = asyncio.Event(), asyncio.Event(), []
    answers: list[WorkerMessage] = []

    async def load_stage(*_: Any) -> Any:
        """Ignores cancellation, like a thread."""
        begun.set()
        while not loaded.is_set():
            with suppress(asyncio.CancelledError):
                await loaded.wait()
        return SimpleNamespace(close=lambda: closed.append("stage"), samples=False)

    async def send(message: WorkerMessage) -> None:
        answers.append(message)

    monkeypatch.setattr(loads, "load_stage", load_stage)
    worker, member, order = loads_of(send)
    if when == "before the load":
        member.end()
    loading = asyncio.create_task(member.load(order))
    await begun.wait()
    if when == "at its end":
        loaded.set()
    if when != "before the load":
        member.end()
    loaded.set()
    await loading
    worker.service.keep()
    assert closed == ["stage"] and not worker.service.holds_layers and not worker.service.has_kept
    (answer,) = answers
    assert isinstance(answer, LoadFailed) and answer.failure.message == "the membership has ended"


async def test_no_load_begins_before_the_thread_of_an_earlier_membership_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, released = threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        released.wait()

    async def in_thread(order: Any, device: object, files: Any, reserved_bytes: int) -> None:
        await files.progress.in_thread(work)

    async def send(message: WorkerMessage) -> None:
        """Drops it, because nobody listens at the end."""

    monkeypatch.setattr(load, "_load", in_thread)
    worker, member, order = loads_of(send)
    tasks = TaskSet()
    tasks.start(member.load(order))
    try:
        assert await asyncio.to_thread(begun.wait, 60)
        tasks.start(member.unload(Unload(1)))
        await asyncio.sleep(0)
        member.end()
        await tasks.close()
        following = asyncio.create_task(worker.exclusive.acquire())
        for _ in range(100):
            await asyncio.sleep(0)
        assert not following.done()
    finally:
        released.set()
    assert await following

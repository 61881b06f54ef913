"""Tests of background tasks: they are kept until they end, joined and cancelled."""

from __future__ import annotations

import asyncio
import logging

import pytest

from llamaclust.wire.rpc.task_set import TaskSet


async def test_join_waits_for_tasks_that_tasks_start() -> None:
    tasks, ended = TaskSet(), []

    async def work(more: int) -> None:
        await asyncio.sleep(0)
        if more:
            tasks.start(work(more - 1))
        ended.append(more)

    tasks.start(work(3))
    await tasks.join()
    assert ended == [3, 2, 1, 0] and not len(tasks)


async def test_close_cancels_and_waits() -> None:
    tasks, cleaned = TaskSet(), []

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            cleaned.append(True)

    started = [tasks.start(work()) for _ in range(2)]
    await asyncio.sleep(0)
    await tasks.close()
    assert cleaned == [True, True] and all(task.cancelled() for task in started)


async def test_an_error_of_a_task_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def work() -> None:
        raise ValueError("out of luck")

    tasks = TaskSet()
    with caplog.at_level(logging.ERROR):
        tasks.start(work())
        await tasks.join()
        await asyncio.sleep(0)
    assert "out of luck" in caplog.text

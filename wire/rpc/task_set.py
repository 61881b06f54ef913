from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any, TypeVar

_log = logging.getLogger(__name__)

Result = TypeVar("Result")


class TaskSet:
    """Keeps references to tasks, because the event loop itself keeps only weak references. Logs the errors of tasks."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    def __len__(self) -> int:
        return len(self._tasks)

    def start(self, work: Coroutine[Any, Any, Result]) -> asyncio.Task[Result]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("a background task failed", exc_info=error)

    async def join(self) -> None:
        """Waits until all tasks have ended, with or without errors. The caller should set a deadline."""
        while self._tasks:
            await asyncio.wait(self._tasks)  # Unlike gather, wait does not cancel the tasks when it is cancelled.

    def cancel(self) -> None:
        for task in tuple(self._tasks):
            task.cancel()

    async def close(self) -> None:
        self.cancel()
        await self.join()

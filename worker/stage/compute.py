"""Where a worker computes: short jobs on the event loop, which saves two changes of thread, long ones beside it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from functools import partial
from queue import SimpleQueue
from time import perf_counter_ns
from typing import Any, TypeVar

from llamaclust.core.errors import DeadlineError, DeviceLostError
from llamaclust.wire.rpc.deadlines import deadline

INLINE_NS = 200_000_000
"""What signs of life and the coordinator's orders may wait; a change of thread and back takes 0.1 to 0.3 ms."""

_Answer = TypeVar("_Answer")
_Entry = tuple[Callable[[], Any], "asyncio.Future[Any]"]


class Compute:
    """Runs the jobs of all stages one at a time, in the order of their coming. Native calls release the GIL."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: SimpleQueue[_Entry | None] = SimpleQueue()
        self._queued = 0
        self._begun_ns = 0  # of the thread's present job (perf_counter_ns); 0: there is none
        self._lost: asyncio.Future[None] = self._loop.create_future()
        threading.Thread(target=self._work, name="compute", daemon=True).start()

    async def run(self, job: Callable[[], _Answer], expected_ns: int = INLINE_NS) -> _Answer:
        """What `job` returns or raises. A job that is cancelled while it computes still ends before the next begins."""
        if expected_ns < INLINE_NS and self._queued == 0:
            return job()
        return await asyncio.shield(self.queue(job))

    @property
    def computing_s(self) -> float:
        """Since the thread's present job began; 0.0 where there is none."""
        begun_ns = self._begun_ns
        return (perf_counter_ns() - begun_ns) / 1e9 if begun_ns else 0.0

    async def idle(self, deadline_s: float) -> None:
        """Returns when the jobs of before have ended. DeviceLostError where one does not."""
        try:
            async with deadline("the end of a step", deadline_s):
                await self.run(lambda: None)
        except DeadlineError as error:
            text = f"a step has been computed for {self.computing_s:.0f} s and does not end: this process ends"
            raise DeviceLostError(text) from error

    def queue(self, job: Callable[[], _Answer]) -> asyncio.Future[_Answer]:
        """Has the thread run `job` right after those before it, whatever the event loop does meanwhile."""
        answer: asyncio.Future[_Answer] = self._loop.create_future()
        answer.add_done_callback(self._settled)
        self._queued += 1
        self._queue.put((job, answer))
        return answer

    def give_up(self, error: DeviceLostError) -> None:
        """What it computes on is lost. From any thread."""
        self._loop.call_soon_threadsafe(self._lose, error)

    def _lose(self, error: DeviceLostError) -> None:
        if not self._lost.done():
            self._lost.set_exception(error)

    async def while_able(self, life: Coroutine[None, None, _Answer]) -> _Answer:
        """What `life` returns; DeviceLostError where what it computes on is lost before."""
        living = asyncio.create_task(life)
        try:
            await asyncio.wait((living, self._lost), return_when=asyncio.FIRST_COMPLETED)
            if self._lost.done():
                self._lost.result()
            return await living
        finally:
            living.cancel()

    def _settled(self, answer: asyncio.Future[Any]) -> None:
        self._queued -= 1
        if not answer.cancelled():
            answer.exception()  # retrieved: its caller may be gone

    def close(self) -> None:
        """Lets the thread end after the jobs that are queued, and does not wait for it."""
        self._queue.put(None)

    def _work(self) -> None:
        while (entry := self._queue.get()) is not None:
            job, answer = entry
            self._begun_ns = perf_counter_ns()
            settle: Callable[[], None]
            try:
                settle = partial(answer.set_result, job())
            except Exception as error:  # noqa: BLE001  a border between threads: the other side raises it
                settle = partial(answer.set_exception, error)
            self._begun_ns = 0
            try:
                self._loop.call_soon_threadsafe(settle)
            except RuntimeError:  # the loop is closed: the process is about to end
                return

"""Runs a worker's computations: short jobs on the event loop, to save two thread switches, and others on a thread."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from contextlib import suppress
from functools import partial
from math import inf
from queue import SimpleQueue
from time import perf_counter_ns
from typing import Any, TypeVar

from llamaclust.core.errors import DeadlineError, DeviceLostError
from llamaclust.core.process_settings import lower_priority
from llamaclust.wire.rpc.deadlines import deadline

INLINE_NS = 200_000_000
"""Maximum duration of a job on the event loop. It delays heartbeats, but saves two thread switches (0.1 to 0.3 ms)."""

_Answer = TypeVar("_Answer")
_HOLD_NS = 8_000_000
"""Maximum time for which results of short jobs are collected before the event loop gets them all at once."""

_Entry = tuple[Callable[[], Any], "asyncio.Future[Any]", float, float]
_WATCH_S = 1.0
_HUNG_TIMES, _HUNG_LEAST_S = 20, 30.0
"""A step counts as hung after 30 s plus 20 times the duration of the last similar step (see `step_limit_s`)."""


def step_limit_s(last_ns: int | None, *, on_gpus: bool) -> float:
    """Returns the seconds after which a step counts as hung: infinity if `last_ns` is None or `on_gpus` is False."""
    return _HUNG_LEAST_S + _HUNG_TIMES * last_ns / 1e9 if on_gpus and last_ns is not None else inf


class Compute:
    """Runs the jobs of all stages one at a time, in the order of arrival. Native calls release the GIL."""

    def __init__(self, *, inline: bool = True, niceness: int = 0) -> None:
        self._loop = asyncio.get_running_loop()
        self._inline_ns = INLINE_NS if inline else 0
        self._queue: SimpleQueue[_Entry | None] = SimpleQueue()
        self._queued = 0
        # (perf_counter_ns at the start of the thread's job, the job's limit_s).
        self._present: tuple[int, float] | None = None
        self._lost: asyncio.Future[None] = self._loop.create_future()
        threading.Thread(target=self._work, args=(niceness,), name="compute", daemon=True).start()

    async def run(self, job: Callable[[], _Answer], *, expected_ns: int = INLINE_NS, limit_s: float = inf) -> _Answer:
        """Runs `job` and returns its result. A job that has begun runs to its end even if the caller is cancelled."""
        # A job with a limit runs on the thread, because the event loop watches the limit.
        if expected_ns < self._inline_ns and limit_s == inf and self._queued == 0:
            return job()
        return await asyncio.shield(self.queue(job, limit_s=limit_s))

    def apart(self, niceness: int = 0) -> Compute:
        """Returns a Compute for the same devices that has its own thread. `niceness` lowers the thread's priority."""
        twin = Compute(inline=False, niceness=niceness)
        twin._lost = self._lost
        return twin

    @property
    def computing_s(self) -> float:
        present = self._present
        return 0.0 if present is None else (perf_counter_ns() - present[0]) / 1e9

    async def idle(self, deadline_s: float) -> None:
        """Waits until earlier jobs have ended. Raises DeviceLostError if a job does not end in time."""
        try:
            async with deadline("the end of a step", deadline_s):
                await self.run(lambda: None)
        except DeadlineError as error:
            text = f"a step has run for {self.computing_s:.0f} s and does not end, so this worker process ends"
            raise DeviceLostError(text) from error

    def queue(
        self, job: Callable[[], _Answer], *, limit_s: float = inf, expected_ns: float = inf
    ) -> asyncio.Future[_Answer]:
        """Runs `job` on the thread after earlier jobs. If it takes longer than `limit_s`, the device counts as lost."""
        answer: asyncio.Future[_Answer] = self._loop.create_future()
        answer.add_done_callback(self._settled)
        self._queued += 1
        self._queue.put((job, answer, limit_s, expected_ns))
        return answer

    def give_up(self, error: DeviceLostError) -> None:
        """Reports a lost device. Any thread may call this."""
        self._loop.call_soon_threadsafe(self._lose, error)

    def _lose(self, error: DeviceLostError) -> None:
        if not self._lost.done():
            self._lost.set_exception(error)

    async def run_until_device_lost(self, life: Coroutine[None, None, _Answer]) -> _Answer:
        """Awaits `life` and returns its result. Raises DeviceLostError if a device is lost or a job takes too long."""
        living, watching = asyncio.create_task(life), asyncio.create_task(self._watch())
        try:
            await asyncio.wait((living, self._lost), return_when=asyncio.FIRST_COMPLETED)
            if self._lost.done():
                self._lost.result()
            return await living
        finally:
            living.cancel()
            watching.cancel()

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(_WATCH_S)
            if (present := self._present) is None:
                continue
            begun_ns, limit_s = present
            if (taken_s := (perf_counter_ns() - begun_ns) / 1e9) > limit_s:
                text = f"the GPU hangs: a step has run for {taken_s:.0f} s, but the limit is {limit_s:.0f} s"
                self._lose(DeviceLostError(f"{text}; this worker process ends"))
                return

    def _settled(self, answer: asyncio.Future[Any]) -> None:
        self._queued -= 1
        if not answer.cancelled():
            answer.exception()  # Marks the error as retrieved, because the caller may have been cancelled.

    def close(self) -> None:
        self._queue.put(None)

    def _work(self, niceness: int) -> None:
        lower_priority(niceness)
        held = _Held(self._loop)
        while not self._queue.empty() or held.hand_back():
            entry = self._queue.get()
            if entry is None:
                held.hand_back()
                return
            job, answer, limit_s, expected_ns = entry
            held.before(expected_ns)
            self._present = perf_counter_ns(), limit_s
            try:
                held.add(partial(answer.set_result, job()))
            except Exception as error:  # noqa: BLE001  the error is raised in the caller's task
                held.add(partial(answer.set_exception, error))
            self._present = None
            del entry, job, answer  # The job may refer to a freed stage, and the next job may come much later.


class _Held:
    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._answers: list[Callable[[], None]] = []
        self._until_ns = 0.0

    def add(self, answer: Callable[[], None]) -> None:
        if not self._answers:
            self._until_ns = perf_counter_ns() + _HOLD_NS
        self._answers.append(answer)

    def before(self, expected_ns: float) -> None:
        """Passes results to the event loop if a job that takes about `expected_ns` would delay the results too long."""
        if self._answers and perf_counter_ns() + expected_ns > self._until_ns:
            self.hand_back()

    def hand_back(self) -> bool:
        answers, self._answers = self._answers, []
        try:
            if answers:
                self._loop.call_soon_threadsafe(_call_all, answers)
        except RuntimeError:  # The event loop is closed, and the process is about to end.
            return False
        return True


def _call_all(answers: list[Callable[[], None]]) -> None:
    for answer in answers:
        # A cancelled future must not keep the other answers from their callers.
        with suppress(asyncio.InvalidStateError):
            answer()

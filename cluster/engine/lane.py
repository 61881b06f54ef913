"""Runs a lane, which is a pipeline together with the scheduler of its sequences."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence, Set
from time import monotonic_ns
from typing import TYPE_CHECKING

from llamaclust.cluster.engine.draft_runner import DraftRunner
from llamaclust.cluster.engine.kv_disk import KvDisk
from llamaclust.cluster.engine.pipeline import Pipeline
from llamaclust.cluster.scheduler import sequences
from llamaclust.cluster.scheduler.scheduler import Scheduler
from llamaclust.cluster.scheduler.settings import EngineSettings
from llamaclust.core.errors import DeadlineError
from llamaclust.wire.microbatch.messages import Result

if TYPE_CHECKING:
    from llamaclust.cluster.engine.engine import Engine


class Lane:
    """Sends its scheduler's microbatches to the pipeline. If a result is too late, the pipeline counts as lost."""

    def __init__(self, pipeline: Pipeline, scheduler: Scheduler, engine: Engine, deadlines: EngineSettings) -> None:
        self.pipeline = pipeline
        self.scheduler = scheduler
        self._engine = engine
        self._deadlines = deadlines
        self.kv_disk = KvDisk(pipeline.kv_disks, scheduler, self, engine.metrics.restored)
        self._draft_runner = DraftRunner(scheduler, self.launch_soon)
        self._tasks: list[asyncio.Task[None]] = []
        self._is_running = False
        self._is_launch_due = False
        self._changed = asyncio.Event()  # Set when results have come, and when the lane stops.

    def start(self) -> None:
        self._is_running = True
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(work) for work in (self.pipeline.run(self._take), self._watch())]
        for task in self._tasks:
            task.add_done_callback(self._ended)
        self.kv_disk.start()
        self.launch_soon()

    def stop(self) -> None:
        self._is_running = False
        self.kv_disk.stop()
        self._draft_runner.stop()
        for task in self._tasks:
            task.cancel()
        self._changed.set()

    async def wait_stopped(self) -> None:
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def wait_unused(self, adapters: Set[int]) -> None:
        """Waits until no microbatch in flight uses one of the adapters, or until the lane stops."""
        while self._is_running and self.scheduler.in_flight.adapters & adapters:
            self._changed.clear()
            await self._changed.wait()

    def disk_hangs(self, error: DeadlineError) -> None:
        self._engine.lane_lost(self, error)

    def arrived(self, sequence: sequences.Sequence) -> None:
        self.kv_disk.arrived(sequence)
        self.launch_soon()

    def launch_soon(self) -> None:
        """Calls `launch` after the callbacks that are due now. Requests that arrive together then start together."""
        if self._is_running and not self._is_launch_due:
            self._is_launch_due = True
            asyncio.get_running_loop().call_soon(self.launch)

    def launch(self) -> None:
        self._is_launch_due = False
        self._guard(self._send_all)

    def _send_all(self) -> None:
        scheduled = tuple(iter(lambda: self.scheduler.next_microbatch(monotonic_ns()), None))
        if scheduled:
            self.pipeline.submit(*scheduled)
        self._draft_runner.request()

    def _take(self, results: Sequence[Result]) -> None:
        self._guard(lambda: self._engine.completed(self, results))
        self._changed.set()

    def _guard(self, work: Callable[[], None]) -> None:
        if not self._is_running:
            return
        try:
            work()
        except Exception as error:  # noqa: BLE001  the engine handles all errors of a lane
            self._engine.lane_lost(self, error)

    def _ended(self, task: asyncio.Task[None]) -> None:
        error = None if task.cancelled() else task.exception()
        if error is not None and self._is_running:
            self._engine.lane_lost(self, error)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self._deadlines.watch_s)
            sent_ns = self.scheduler.in_flight.oldest_ns
            age_s = (monotonic_ns() - sent_ns) / 1e9 if sent_ns is not None else 0.0
            if age_s > self._deadlines.result_s:
                stages = ", ".join(f"{s.worker} (layers {s.start}-{s.end - 1})" for s in self.pipeline.stages)
                raise DeadlineError(f"the workers {stages} returned no result of a microbatch for {age_s:.0f} s")

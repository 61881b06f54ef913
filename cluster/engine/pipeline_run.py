"""Runs one pipeline in tasks of its own until it is stopped or lost."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from time import monotonic_ns

from llamaclust.cluster.engine.pipeline import Pipeline
from llamaclust.cluster.scheduler.settings import EngineSettings
from llamaclust.core.errors import DeadlineError
from llamaclust.wire.microbatch.messages import Result


class PipelineRun:
    """Starts with its creation. A microbatch whose result never comes means that the pipeline is lost."""

    def __init__(
        self,
        pipeline: Pipeline,
        settings: EngineSettings,
        *,
        on_result: Callable[[Result], None],
        on_lost: Callable[[BaseException], None],
        oldest_sent_ns: Callable[[], int | None],
    ) -> None:
        self.pipeline = pipeline
        self._settings = settings
        self._on_result = on_result
        self._on_lost = on_lost
        self._oldest_sent_ns = oldest_sent_ns
        self._is_stopped = False
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(work) for work in (pipeline.run(self._take), self._watch())]
        for task in self._tasks:
            task.add_done_callback(self._ended)

    def stop(self) -> None:
        """Results that come later are ignored."""
        self._is_stopped = True
        for task in self._tasks:
            task.cancel()

    async def wait_stopped(self) -> None:
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _take(self, result: Result) -> None:
        if not self._is_stopped:
            self._on_result(result)

    def _ended(self, task: asyncio.Task[None]) -> None:
        error = None if task.cancelled() else task.exception()
        if error is not None and not self._is_stopped:
            self._on_lost(error)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self._settings.watch_s)
            sent_ns = self._oldest_sent_ns()
            age_s = (monotonic_ns() - sent_ns) / 1e9 if sent_ns is not None else 0.0
            if age_s > self._settings.result_s:
                stages = ", ".join(f"{s.worker} (layers {s.start}-{s.end - 1})" for s in self.pipeline.stages)
                raise DeadlineError(f"no result of a microbatch for {age_s:.0f} s from the workers {stages}")

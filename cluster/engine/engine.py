"""Runs requests on a pipeline: schedule, run, complete. What to run is the scheduler's decision."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, StrEnum, auto
from functools import partial
from time import monotonic_ns
from typing import Self

from llamaclust.cluster.engine.metrics import Metrics
from llamaclust.cluster.engine.pipeline import Pipeline
from llamaclust.cluster.engine.request_stream import Mailbox, OpenRequests, RequestStream
from llamaclust.cluster.scheduler.requests import Finished, GenerationRequest, TokenSampled
from llamaclust.cluster.scheduler.scheduler import Scheduler
from llamaclust.cluster.scheduler.settings import EngineSettings, SchedulerSettings
from llamaclust.cluster.scheduler.strikes import MAX_STRIKES
from llamaclust.core.errors import DeadlineError, LlamaclustError, RequestFailedError, WorkerError
from llamaclust.wire.microbatch.messages import Result

_STOPPING = "the cluster is stopping"

_log = logging.getLogger(__name__)


class EngineState(StrEnum):
    """What an engine does with requests, for operators."""

    READY = "ready"
    RECOVERING = "recovering"  # the pipeline is lost: requests are accepted, and wait
    DRAINING = "draining"  # accepted requests are served to their end; the API refuses others
    REFUSING = "refusing"  # the pipeline is lost and requests are refused, until workers are back
    DOWN = "down"  # requests are refused for good


class _Phase(Enum):
    """What an engine's pipeline does."""

    RUNNING = auto()
    LOST = auto()  # until `resume` or `give_up`
    GIVEN_UP = auto()  # until `resume`
    CLOSED = auto()


@dataclass(eq=False, kw_only=True)
class PipelineRun:
    """Runs one pipeline in tasks of its own, from its creation until it is stopped or lost. A microbatch whose result
    never comes means that the pipeline is lost."""

    pipeline: Pipeline
    deadlines: EngineSettings
    on_result: Callable[[Result], None]
    on_lost: Callable[[BaseException], None]
    oldest_sent_ns: Callable[[], int | None]

    def __post_init__(self) -> None:
        self._is_stopped = False
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(work) for work in (self.pipeline.run(self._take), self._watch())]
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
            self.on_result(result)

    def _ended(self, task: asyncio.Task[None]) -> None:
        error = None if task.cancelled() else task.exception()
        if error is not None and not self._is_stopped:
            self.on_lost(error)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self.deadlines.watch_s)
            sent_ns = self.oldest_sent_ns()
            age_s = (monotonic_ns() - sent_ns) / 1e9 if sent_ns is not None else 0.0
            if age_s > self.deadlines.result_s:
                stages = ", ".join(f"{s.worker} (layers {s.start}-{s.end - 1})" for s in self.pipeline.stages)
                raise DeadlineError(f"no result of a microbatch for {age_s:.0f} s from the workers {stages}")


class Engine:
    """A context manager: runs while it is open. Pipelines are their owner's to close, after the engine.

    A lost pipeline closes the engine. With `on_lost`, requests wait instead, until `resume` with another pipeline or
    `give_up`.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        settings: SchedulerSettings,
        deadlines: EngineSettings | None = None,
        on_lost: Callable[[LlamaclustError], None] | None = None,
    ) -> None:
        self.scheduler = Scheduler(settings, pipeline.epoch, len(pipeline.stages))
        self.metrics = Metrics(pipeline.stages, lambda: self.scheduler.counts, monotonic_ns)
        self.requests = OpenRequests(self.metrics)
        self.error: LlamaclustError | None = None  # why it is down or recovering
        self._phase = _Phase.RUNNING
        self._is_draining = False
        self._on_lost = on_lost
        self._pipeline = pipeline
        self._deadlines = deadlines or EngineSettings()
        self._run: PipelineRun | None = None
        self._is_launch_due = False

    @property
    def state(self) -> EngineState:
        if self._phase is _Phase.CLOSED:
            return EngineState.DOWN
        if self._phase is _Phase.GIVEN_UP:
            return EngineState.REFUSING
        if self._is_draining:
            return EngineState.DRAINING
        return EngineState.RECOVERING if self._phase is _Phase.LOST else EngineState.READY

    async def __aenter__(self) -> Self:
        self._start(self._pipeline)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.break_down(WorkerError(_STOPPING))
        if self._run is not None:
            await self._run.wait_stopped()

    def submit(self, request: GenerationRequest) -> RequestStream:
        """Queues a request. Raises RequestError, QueueFullError, or WorkerError where the engine refuses or is down.

        Requests are accepted while it drains: the API refuses new ones, and accepted ones still submit their further
        choices.
        """
        if self._phase in (_Phase.GIVEN_UP, _Phase.CLOSED):
            raise WorkerError(str(self.error or _STOPPING))
        sequence = self.scheduler.add(request, monotonic_ns())
        mailbox = Mailbox(sequence)
        for row in request.answered:
            mailbox.put(TokenSampled(row))
        end = sequence.known_end
        if end is None:
            self.requests.open(mailbox, self._deadlines.request_s, partial(self._expire, sequence.key))
            self._launch_soon()
        else:
            mailbox.put(Finished(end, sequence.timings()))
            mailbox.close()
        return RequestStream(mailbox, partial(self._abort, sequence.key))

    async def drain(self, timeout_s: float) -> bool:
        """Waits for the requests it has; False where some are left after `timeout_s`."""
        self._is_draining = True
        try:
            async with asyncio.timeout(timeout_s):
                await self.requests.wait_empty()
        except TimeoutError:
            return False
        return True

    # -- schedule, run, complete -----------------------------------------------------------------------------------

    def _launch_soon(self) -> None:
        """After the loop's other callbacks: requests that come together start together."""
        if not self._is_launch_due:
            self._is_launch_due = True
            asyncio.get_running_loop().call_soon(self._guard, self._launch)

    def _guard(self, work: Callable[..., None], *arguments: object) -> None:
        """Work that the event loop calls: an error ends the pipeline, so that readers get it."""
        if self._phase in (_Phase.GIVEN_UP, _Phase.CLOSED):
            return
        try:
            work(*arguments)
        except Exception as error:  # noqa: BLE001  a border
            self.lose(error)

    def _launch(self) -> None:
        self._is_launch_due = False
        if self._phase is not _Phase.RUNNING:
            return
        while (scheduled := self.scheduler.next_microbatch(monotonic_ns())) is not None:
            self._pipeline.submit(scheduled.microbatch, scheduled.inputs)

    def _complete(self, result: Result) -> None:
        if result.failure is not None:
            self.lose(WorkerError(result.failure), result.number)
            return
        now_ns = monotonic_ns()
        updated = self.scheduler.complete(result, now_ns)
        self._guard(self._launch)
        tokens = sum(self.requests.deliver(key, updates) for key, updates in updated)
        self.metrics.completed(result, tokens, now_ns)

    def _abort(self, key: int, error: LlamaclustError | None = None) -> None:
        """Ends a request: cancelled, or failed with an error."""
        if self.scheduler.abort(key) is not None:
            self.requests.abort(key, error)
            self._launch_soon()

    def _expire(self, key: int) -> None:
        limit = f"the request took longer than {self._deadlines.request_s:g} s (timeouts.request)"
        self._abort(key, DeadlineError(limit))

    # -- a lost pipeline, another one, the end -----------------------------------------------------------------------

    def _start(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        self._run = PipelineRun(
            pipeline=pipeline,
            deadlines=self._deadlines,
            on_result=partial(self._guard, self._complete),
            on_lost=self.lose,
            oldest_sent_ns=lambda: self.scheduler.in_flight.oldest_ns,
        )

    def _stop(self) -> None:
        if self._run is not None:
            self._run.stop()

    def lose(self, error: BaseException, microbatch: int | None = None) -> None:
        """The pipeline failed, in this microbatch where that is known: a request in flight may be the cause."""
        failed: dict[int, LlamaclustError] = {}
        if self._phase is _Phase.RUNNING and self._on_lost is not None and isinstance(error, LlamaclustError):
            for sequence in self.scheduler.strikes.add(self.scheduler.in_flight.slices(microbatch)):
                what = f"request {sequence.request.request_id}: the pipeline failed {MAX_STRIKES} times"
                failed[sequence.key] = RequestFailedError(
                    f"{what} while it computed this request, at last alone: {error}"
                )
        self.interrupt(next(iter(failed.values()), error))
        for key, reason in failed.items():
            self._abort(key, reason)

    def interrupt(self, error: BaseException) -> None:
        """Gives up the pipeline, which is lost or to be replaced."""
        if self._on_lost is None or not isinstance(error, LlamaclustError):
            self.break_down(error)
        elif self._phase is _Phase.RUNNING:
            self._stop()
            self._phase = _Phase.LOST
            self.error = error
            self._on_lost(error)

    def resume(self, pipeline: Pipeline, settings: SchedulerSettings) -> None:
        """Continues on a new pipeline: every request is computed again from its own tokens."""
        if self._phase is _Phase.CLOSED:
            return
        self._stop()
        self.scheduler.restart(settings, pipeline.epoch, len(pipeline.stages))
        self.metrics.restart(pipeline.stages)
        self._phase = _Phase.RUNNING
        self.error = None
        self._start(pipeline)
        self._is_launch_due = False  # one that was due while it was down did nothing
        self._launch_soon()

    def give_up(self, error: LlamaclustError) -> None:
        """Ends every request with `error`; no more are accepted until `resume`."""
        if self._phase is not _Phase.CLOSED:
            self._fail(_Phase.GIVEN_UP, error)

    def break_down(self, error: BaseException) -> None:
        """Ends every request with `error`; no more are ever accepted."""
        if self._phase is _Phase.CLOSED:
            return
        if not isinstance(error, LlamaclustError):
            _log.error("the engine broke", exc_info=error)
            error = LlamaclustError(f"the engine broke: {type(error).__name__}: {error}")
        self._stop()
        self._fail(_Phase.CLOSED, error)

    def _fail(self, phase: _Phase, error: LlamaclustError) -> None:
        self._phase = phase
        self.error = error
        for key in self.requests.keys:
            self.scheduler.abort(key)
            self.requests.abort(key, error)

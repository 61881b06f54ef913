"""Runs requests on a pipeline. Sends the scheduler's microbatches to the pipeline, and processes their results."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence, Set
from enum import Enum, StrEnum, auto
from functools import partial
from time import monotonic_ns
from typing import Self

from llamaclust.cluster.engine.encoder import Encoder
from llamaclust.cluster.engine.failures import (
    EngineOwner,
    PipelineFailure,
    RetiringFailure,
    failure_of,
    row_failure,
    stage_error,
)
from llamaclust.cluster.engine.lane import Lane
from llamaclust.cluster.engine.metrics import Metrics
from llamaclust.cluster.engine.pipeline import Pipeline
from llamaclust.cluster.engine.request_stream import OpenRequests, RequestStream, Sink, SubmittedRequest
from llamaclust.cluster.engine.retirement import Retirement
from llamaclust.cluster.engine.waterfall import ComputedMicrobatch
from llamaclust.cluster.engine.waterfalls import Waterfalls
from llamaclust.cluster.scheduler.counts import Counts
from llamaclust.cluster.scheduler.requests import Finished, FinishReason, GenerationRequest, TokenSampled
from llamaclust.cluster.scheduler.rows.completed import Completed
from llamaclust.cluster.scheduler.scheduler import Scheduler
from llamaclust.cluster.scheduler.settings import EngineSettings, SchedulerSettings
from llamaclust.core.errors import (
    ClusterStoppingError,
    DeadlineError,
    LlamaclustError,
    WorkerError,
)
from llamaclust.model.projectors.projector import Projector
from llamaclust.wire.microbatch.messages import Result

_STOPPING = "the cluster is stopping"

_log = logging.getLogger(__name__)


def _done_ns(results: Sequence[Result], now_ns: int) -> list[int]:
    """Estimates the times at which the results were computed. The results arrived together."""
    ends = [now_ns]
    for result in reversed(results[1:]):
        ends.append(ends[-1] - min((timing.compute_ns for timing in result.timings), default=0))
    return ends[::-1]


class EngineState(StrEnum):
    READY = "ready"
    ASLEEP = "asleep"  # The model is not loaded. A request is accepted and causes the model to be loaded.
    RECOVERING = "recovering"  # The pipeline was lost. Requests are accepted, and wait for the next pipeline.
    DRAINING = "draining"  # Accepted requests are finished. The API refuses other requests.
    REFUSING = "refusing"  # The pipeline was lost. Requests are refused until workers have connected again.
    DOWN = "down"  # Requests are refused until the process ends.


class _Phase(Enum):
    RUNNING = auto()
    ASLEEP = auto()  # This phase lasts until `resume` is called.
    LOST = auto()  # This phase lasts until `resume` or `fail_requests` is called.
    REFUSING = auto()  # This phase lasts until `resume` is called.
    CLOSED = auto()


class Engine:
    """Runs requests while this context manager is open. If the pipeline is lost, requests wait until `owner` calls
    `resume` or `fail_requests`. Without an owner, the engine ends."""

    def __init__(
        self,
        pipeline: Pipeline,
        settings: SchedulerSettings,
        deadlines: EngineSettings | None = None,
        owner: EngineOwner | None = None,
        projector: Projector | None = None,
    ) -> None:
        # Moves the previous lane's sequences to the current lane. None if there is only one lane.
        self.retirement: Retirement | None = None
        self._retiring_failure: RetiringFailure | None = None
        self.metrics = Metrics(pipeline.stages, lambda: self.counts, monotonic_ns)
        self.waterfalls = Waterfalls()
        self.requests = OpenRequests(self.metrics, self.waterfalls)
        self.error: LlamaclustError | None = None  # The reason why the engine is down or recovering.
        self._phase = _Phase.RUNNING if pipeline.stages else _Phase.ASLEEP
        if self._phase is _Phase.ASLEEP:
            self.waterfalls.unloaded(monotonic_ns())
        self._is_draining = False
        self._owner = owner
        self.deadlines = deadlines or EngineSettings()
        announced, deadline_s = self.requests.announced, self.deadlines.request_s
        self.encoder = None if projector is None else Encoder(projector, deadline_s, announced)
        self._encode_by(pipeline)
        scheduler = Scheduler(settings, pipeline.epoch, len(pipeline.stages))
        self._lane = Lane(pipeline, scheduler, self, self.deadlines)
        self._ended = scheduler.counts.totals  # Totals of the lanes that have ended.

    def _encode_by(self, pipeline: Pipeline) -> None:
        if self.encoder is None:
            return
        if pipeline.encoder is not None:
            self.encoder.serve(pipeline.encoder)
        elif pipeline.no_images:
            self.encoder.end(WorkerError(pipeline.no_images))

    def _end_encoding(self, error: LlamaclustError | None) -> None:
        if self.encoder is not None:
            self.encoder.lose(error)

    @property
    def state(self) -> EngineState:
        if self._phase is _Phase.CLOSED:
            return EngineState.DOWN
        if self._phase is _Phase.REFUSING:
            return EngineState.REFUSING
        if self._is_draining:
            return EngineState.DRAINING
        if self._phase is _Phase.ASLEEP:
            return EngineState.ASLEEP
        return EngineState.RECOVERING if self._phase is _Phase.LOST else EngineState.READY

    @property
    def is_running(self) -> bool:
        return self._phase is _Phase.RUNNING

    @property
    def scheduler(self) -> Scheduler:
        return self._lane.scheduler

    @property
    def schedulers(self) -> tuple[Scheduler, ...]:
        return tuple(lane.scheduler for lane in self._lanes)

    @property
    def suspects_request(self) -> bool:
        return any(scheduler.strikes.isolated is not None for scheduler in self.schedulers)

    @property
    def counts(self) -> Counts:
        return sum((scheduler.counts for scheduler in self.schedulers), self._ended)

    @property
    def _lanes(self) -> tuple[Lane, ...]:
        return (self._lane,) if self.retirement is None else (self._lane, self.retirement.old)

    async def __aenter__(self) -> Self:
        if self._phase is _Phase.RUNNING:
            self._lane.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        lanes = self._lanes
        self.shut_down(ClusterStoppingError(_STOPPING))
        for lane in lanes:
            await lane.wait_stopped()

    def submit(self, request: GenerationRequest) -> RequestStream:
        return RequestStream(partial(self.begin, request))

    def check_room(self, owner: str, more: int) -> None:
        """Raises QueueFullError if the queue has no room for `more` sequences of an owner."""
        self.scheduler.check_room(owner, more)

    def begin(self, request: GenerationRequest, sink: Sink) -> SubmittedRequest:
        """Queues a request. Raises RequestError if it is invalid, QueueFullError if the queue is full, and WorkerError
        if the engine refuses requests."""
        if self._phase in (_Phase.REFUSING, _Phase.CLOSED):
            raise WorkerError(str(self.error or _STOPPING))
        sequence = self.scheduler.add(request, monotonic_ns())
        submitted = SubmittedRequest(sequence, sink, partial(self._abort, sequence.key, None))
        end = sequence.known_end
        if end is None:
            passed_s = (monotonic_ns() - request.received_ns) / 1e9 if request.received_ns else 0.0
            limit_s = self.deadlines.request_s - passed_s
            self.requests.open(submitted, limit_s, partial(self._expire, sequence.key))
            self._lane.arrived(sequence)
        sink.begin(submitted)
        for row in request.answered:
            sink.take(TokenSampled(row))
        if end is not None:
            sink.take(Finished(end, submitted.timings))
            submitted.end()
        return submitted

    def prepare_matchers(self) -> None:
        self._lane.pipeline.prepare_matchers()

    async def drain(self, timeout_s: float) -> bool:
        self._is_draining = True
        try:
            async with asyncio.timeout(timeout_s):
                await self.requests.wait_empty()
        except TimeoutError:
            return False
        return True

    async def wait_unused(self, adapters: Set[int]) -> None:
        """Waits until no microbatch in flight uses one of the adapters. The pipeline may be lost meanwhile."""
        for lane in self._lanes:
            await lane.wait_unused(adapters)

    # -- schedule, run, complete -----------------------------------------------------------------------------------

    def completed(self, lane: Lane, results: Sequence[Result]) -> None:
        now_ns, drafts, completed = monotonic_ns(), lane.scheduler.drafts, list[Completed]()
        failed: Result | None = None
        try:
            for result, done_ns in zip(results, _done_ns(results, now_ns), strict=True):
                if result.failure is not None:
                    failed = result
                    break
                completed.append(self._complete(lane, result, done_ns))
            else:
                lane.launch()
        finally:  # Results that came before an invalid result are still counted.
            tokens = sum(self.requests.deliver(key, updates) for each in completed for key, updates in each.updated)
            self.metrics.sampled(tokens, now_ns)
            self.metrics.drafted(lane.scheduler.drafts - drafts, now_ns)
        if failed is not None:
            self.lane_lost(lane, stage_error(failed, lane.pipeline.stages), failed.number)
        elif faults := [fault for each in completed for fault in each.faults]:
            failure = row_failure(faults, lane.pipeline.stages)
            # A request must not come back to the worker that failed on its rows.
            if self._lane.pipeline.stages[-1].worker == failure.error.worker:
                self._interrupt(failure)
            else:
                self._end_retirement(failure.error)

    def _complete(self, lane: Lane, result: Result, done_ns: int) -> Completed:
        in_flight = lane.scheduler.in_flight
        slices, sent_ns = in_flight.slices(result.number), in_flight.oldest_ns or done_ns
        is_suspicious = bool(result.embeddings) or any(row.failure for row in result.rows)
        suspects_workers = is_suspicious and self._owner is not None and self._owner.may_suspect_workers
        completed = lane.scheduler.complete(result, done_ns, suspects_workers=suspects_workers)
        for key in completed.failed_elsewhere:
            if self._owner is not None:
                self._owner.rows_failed(key)
        self.waterfalls.computed(slices, ComputedMicrobatch.of(lane.pipeline.stages, result.timings, sent_ns, done_ns))
        if self.retirement is not None:
            completed.updated = self.retirement.receive(completed.updated)
            self._advance_retirement()
        lane.kv_disk.completed(result.number, map(self.requests.sequence, [key for key, _ in completed.updated]))
        if lane is self._lane:
            self.metrics.completed(result, done_ns)
            if self._retiring_failure is not None and self._retiring_failure.is_over(result.number):
                self._retiring_failure = None
        return completed

    def _abort(self, key: int, error: LlamaclustError | None = None, reason: FinishReason = FinishReason.ABORT) -> None:
        for lane in self._lanes:
            if lane.scheduler.abort(key) is not None:
                self.requests.abort(key, error, reason)
                lane.launch_soon()
                self._advance_retirement()
                return

    def _expire(self, key: int) -> None:
        limit = f"the request took longer than {self.deadlines.request_s:g} s (timeouts.request)"
        if any(sequence.key == key for sequence in self.scheduler.queues.too_long):
            room = self.scheduler.settings.max_sequence_tokens
            limit += f": it waited for workers, since KV memory of those left holds only {room} tokens"
        self._abort(key, DeadlineError(limit))

    # -- lanes -----------------------------------------------------------------------------------------------------

    def resume(self, pipeline: Pipeline, settings: SchedulerSettings) -> Retirement | None:
        if self._phase is _Phase.CLOSED:
            return None
        self._end_retirement()
        self._retiring_failure = None
        old, stages = self._lane, len(pipeline.stages)
        if self._phase is _Phase.RUNNING:
            scheduler = old.scheduler.successor(settings, pipeline.epoch, stages)
        else:
            scheduler = old.scheduler
            scheduler.restart(settings, pipeline.epoch, stages)
            self.waterfalls.resumed(monotonic_ns())
        self._lane = Lane(pipeline, scheduler, self, self.deadlines)
        self.metrics.restart(pipeline.stages)
        self._lane.start()
        self._encode_by(pipeline)
        if self._phase is not _Phase.RUNNING:
            self._phase = _Phase.RUNNING
            self.error = None
            return None
        self.retirement = retirement = Retirement(old, self._lane)
        if self.suspects_request:  # The suspected request must run alone, so it cannot run beside another lane.
            self._end_retirement()
        else:
            asyncio.get_running_loop().call_later(self.deadlines.retirement_s, self._hurry, retirement)
            self._advance_retirement()
        return retirement

    def _hurry(self, retirement: Retirement) -> None:
        if retirement is self.retirement:
            retirement.hurry()
            self._advance_retirement()

    def _advance_retirement(self) -> None:
        if self.retirement is not None:
            self.retirement.advance()
            if self.retirement.is_over:
                self._end_retirement()

    def _end_retirement(self, error: LlamaclustError | None = None) -> None:
        if self.retirement is not None:
            ended, self.retirement = self.retirement, None
            self._ended += ended.end(error)

    def lane_lost(self, lane: Lane, error: BaseException, microbatch: int | None = None) -> None:
        if self._phase is not _Phase.RUNNING or self._owner is None or not isinstance(error, LlamaclustError):
            self.interrupt_pipeline(error)
            return
        stages = lane.pipeline.stages
        if lane is not self._lane:
            failure = failure_of(error, lane.scheduler, stages, microbatch)
            self._retiring_failure = RetiringFailure(failure, self.scheduler.in_flight.newest)
            self._end_retirement(error)
            self._owner.retiring_pipeline_lost(failure)
        else:
            retiring = self._retiring_on(error.worker) if microbatch is None else None
            failure = failure_of(error, lane.scheduler, stages, microbatch, retiring)
            if self._retiring_failure is not None and microbatch is None:
                failure = self._retiring_failure.joined(failure)
            self._interrupt(failure)
        for key, reason in failure.ended.items():
            self._abort(key, reason)

    def _retiring_on(self, worker: str | None) -> Scheduler | None:
        """Returns the retiring lane's scheduler if its pipeline needs `worker`."""
        old = None if self.retirement is None else self.retirement.old
        return old.scheduler if old and worker in old.pipeline.workers else None

    def interrupt_pipeline(self, error: BaseException) -> None:
        if self._owner is None or not isinstance(error, LlamaclustError):
            self.shut_down(error)
        elif self._phase is _Phase.RUNNING:
            self._interrupt(PipelineFailure(error))

    def _interrupt(self, failure: PipelineFailure) -> None:
        assert self._owner is not None
        self._lane.stop()
        self._end_encoding(failure.error)
        self._end_retirement()
        self._phase = _Phase.LOST
        self.waterfalls.lost(monotonic_ns())
        self.error = failure.error
        self._owner.pipeline_lost(failure)

    async def finish_tile(self) -> None:
        """Waits for the image tile that is being encoded. Other tiles wait until `resume` is called."""
        if self.encoder is not None:
            self.encoder.pause()
            await self.encoder.wait_idle()

    def sleep(self, *, is_forced: bool = False) -> bool:
        """Stops using the pipeline until `resume`. Returns False if requests are open and `is_forced` is false."""
        if self._phase is _Phase.CLOSED or not (is_forced or self.requests.are_empty):
            return False
        self._lane.stop()
        self._end_encoding(None)
        self._end_retirement()
        self.waterfalls.unloaded(monotonic_ns())
        self.metrics.restart(())
        self._phase = _Phase.ASLEEP
        self.error = None
        return True

    def fail_requests(self, error: LlamaclustError) -> None:
        if self._phase is not _Phase.CLOSED:
            self._fail(_Phase.REFUSING, error)

    def shut_down(self, error: BaseException) -> None:
        if self._phase is _Phase.CLOSED:
            return
        if not isinstance(error, LlamaclustError):
            _log.error("internal error in the engine", exc_info=error)
            error = LlamaclustError(f"internal error in the engine: {type(error).__name__}: {error}")
        self._lane.stop()
        self._end_retirement()
        self._fail(_Phase.CLOSED, error)
        if self._owner is not None:
            self._owner.engine_closed()

    def _fail(self, phase: _Phase, error: LlamaclustError) -> None:
        self._phase = phase
        self.error = error
        if self.encoder is not None:
            self.encoder.end(error)
        for key in self.requests.keys:
            self.scheduler.abort(key)
            self.requests.abort(key, error)

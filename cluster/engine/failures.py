"""Describes a pipeline's failure to its owner: the worker that caused it, and the requests that were in flight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from llamaclust.cluster.engine.pipeline import StageInfo
from llamaclust.cluster.scheduler.rows.retries import RowFault
from llamaclust.cluster.scheduler.scheduler import Scheduler
from llamaclust.cluster.scheduler.strikes import MAX_STRIKES, FailedSequence
from llamaclust.core.errors import LlamaclustError, ProtocolError, RequestFailedError, WorkerError
from llamaclust.wire.microbatch.messages import Result


class EngineOwner(Protocol):
    """Owns the pipelines of an engine. After a loss, requests wait until the owner provides another pipeline."""

    def pipeline_lost(self, failure: PipelineFailure) -> None: ...

    def retiring_pipeline_lost(self, failure: PipelineFailure) -> None:
        """Reports the loss of a retiring pipeline. Its requests continue on the next pipeline, which is in use."""
        ...

    def engine_closed(self) -> None:
        """Reports that the engine is down until the process ends."""
        ...

    @property
    def may_suspect_workers(self) -> bool:
        """True if other workers could replace a worker that computes no valid results for a request."""
        ...

    def rows_failed(self, key: int) -> None:
        """Reports that a request has failed, because two workers computed no valid result for the same tokens."""
        ...


@dataclass(frozen=True, slots=True)
class PipelineFailure:
    """The failure of a pipeline. `error` names the worker that caused it, if that is known."""

    error: LlamaclustError
    requests: frozenset[int] = frozenset()  # Keys of the requests that were in flight at this failure.
    is_repeated: bool = False  # True if the worker failed to compute the same tokens before.
    # Errors of the requests that end because of this failure, by key.
    ended: Mapping[int, LlamaclustError] = field(default_factory=dict)

    @property
    def causes(self) -> frozenset[int]:
        return frozenset(key for key, error in self.ended.items() if isinstance(error, RequestFailedError))


@dataclass(frozen=True, slots=True)
class RetiringFailure:
    """The failure of a retiring pipeline. The next pipeline may notice later that the same worker is lost."""

    failure: PipelineFailure
    newest: int | None  # Number of the newest microbatch that was in flight on the next pipeline.

    def is_over(self, returned: int) -> bool:
        """Returns True if the next pipeline's microbatch `returned` was sent after the failure."""
        return self.newest is None or returned > self.newest

    def joined(self, later: PipelineFailure) -> PipelineFailure:
        """Adds this failure's requests to `later` if one worker caused both. `later` is the next pipeline's failure."""
        is_same = later.error.worker == self.failure.error.worker
        return replace(later, requests=later.requests | self.failure.requests) if is_same else later


def stage_error(result: Result, stages: Sequence[StageInfo]) -> WorkerError:
    """Returns the error of a failed microbatch, with the worker that failed."""
    assert result.failure is not None
    # The first stage without timings has failed.
    return WorkerError(result.failure, worker=stages[min(len(result.timings), len(stages) - 1)].worker)


def failure_of(
    error: LlamaclustError,
    scheduler: Scheduler,
    stages: Sequence[StageInfo],
    microbatch: int | None,
    retiring: Scheduler | None = None,
) -> PipelineFailure:
    """Describes the failure of `microbatch`, or of all microbatches in flight if `microbatch` is None. `retiring` is
    the scheduler of an older pipeline that fails too."""
    if isinstance(error, ProtocolError) and error.worker is None:
        error.worker = stages[-1].worker
    slices = scheduler.in_flight.slices(microbatch)
    struck_out = scheduler.strikes.add(slices, error.worker)
    if retiring is not None:
        others = retiring.in_flight.slices()
        struck_out += retiring.strikes.add(others, error.worker)
        slices = [*slices, *others]
    requests = frozenset(taken.sequence.key for taken in slices)
    ended = {failed.sequence.key: _ending(failed, error, stages=len(stages)) for failed in struck_out}
    is_repeated = microbatch is not None and any(taken.chunk.checked for taken in slices)
    return PipelineFailure(error, requests, is_repeated, ended)


def row_failure(faults: Sequence[RowFault], stages: Sequence[StageInfo]) -> PipelineFailure:
    worker = stages[-1].worker
    error = WorkerError(f"worker {worker}: {faults[-1].failure}", worker=worker)
    return PipelineFailure(error, frozenset(fault.key for fault in faults), is_repeated=True)


def _ending(failed: FailedSequence, error: LlamaclustError, *, stages: int) -> LlamaclustError:
    """Returns the error for a request that has failed too often. The error blames a worker or the request."""
    what = f"request {failed.sequence.request.request_id}: the pipeline failed {MAX_STRIKES} times"
    (worker, *others) = failed.workers
    if worker is None or others or (stages == 1 and failed.has_results):
        return RequestFailedError(f"{what} while it computed this request, the last time as the only request: {error}")
    return WorkerError(f"{what}, each time at worker {worker}, and no other worker could take its layers: {error}")

"""A pipeline's failures, as its owner receives them: the worker at fault, and the requests in flight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from llamaclust.cluster.engine.pipeline import StageInfo
from llamaclust.cluster.scheduler.rows.retries import RowFault
from llamaclust.cluster.scheduler.scheduler import Scheduler
from llamaclust.cluster.scheduler.strikes import MAX_STRIKES, StruckOut
from llamaclust.core.errors import LlamaclustError, ProtocolError, RequestFailedError, WorkerError
from llamaclust.wire.microbatch.messages import Result


class EngineOwner(Protocol):
    """The owner of an engine's pipelines. After a loss, requests wait until the owner provides another pipeline."""

    def pipeline_lost(self, failure: PipelineFailure) -> None: ...

    @property
    def may_suspect_workers(self) -> bool:
        """True if a worker without results for some rows may be suspected, because other workers can replace it."""
        ...

    def rows_failed(self, key: int) -> None:
        """Reports that a request has ended. Its rows had no result on the suspected worker, nor on another worker."""
        ...


@dataclass(frozen=True, slots=True)
class PipelineFailure:
    """A pipeline's failure. `error` names the worker at fault, if it is known."""

    error: LlamaclustError
    requests: frozenset[int] = frozenset()  # keys of those in flight
    is_repeated: bool = False  # the worker has failed to compute the same rows before
    ended: Mapping[int, LlamaclustError] = field(default_factory=dict)  # by key, requests that end, and why

    @property
    def causes(self) -> frozenset[int]:
        return frozenset(key for key, error in self.ended.items() if isinstance(error, RequestFailedError))


def stage_error(result: Result, stages: Sequence[StageInfo]) -> WorkerError:
    """Returns a failed microbatch's error. The stage that failed is the first stage without timings."""
    assert result.failure is not None
    return WorkerError(result.failure, worker=stages[min(len(result.timings), len(stages) - 1)].worker)


def failure_of(
    error: LlamaclustError, scheduler: Scheduler, stages: Sequence[StageInfo], microbatch: int | None
) -> PipelineFailure:
    """Returns the failure of `microbatch`, or of all in flight if None. Invalid results are the last stage's fault."""
    if isinstance(error, ProtocolError) and error.worker is None:
        error.worker = stages[-1].worker
    slices = scheduler.in_flight.slices(microbatch)
    struck_out = scheduler.strikes.add(slices, error.worker)
    ended = {struck.sequence.key: _ending(struck, error, stages=len(stages)) for struck in struck_out}
    is_repeated = microbatch is not None and any(taken.chunk.checked for taken in slices)
    return PipelineFailure(error, frozenset(taken.sequence.key for taken in slices), is_repeated, ended)


def row_failure(faults: Sequence[RowFault], stages: Sequence[StageInfo]) -> PipelineFailure:
    worker = stages[-1].worker
    error = WorkerError(f"worker {worker}: {faults[-1].failure}", worker=worker)
    return PipelineFailure(error, frozenset(fault.key for fault in faults), is_repeated=True)


def _ending(struck: StruckOut, error: LlamaclustError, *, stages: int) -> LlamaclustError:
    """Returns the error that ends a request. A worker is the cause if all failures were at this worker. The request is
    the cause otherwise, or if there is only one stage and results came between the failures."""
    what = f"request {struck.sequence.request.request_id}: the pipeline failed {MAX_STRIKES} times"
    (worker, *others) = struck.workers
    if worker is None or others or (stages == 1 and struck.has_results):
        return RequestFailedError(f"{what} while it computed this request, finally without other requests: {error}")
    return WorkerError(f"{what}, each time at worker {worker}, and no other worker could take its layers: {error}")

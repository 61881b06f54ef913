"""Which worker a pipeline was lost by, whoever tells of it first."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from llamaclust.cluster.engine.pipeline import StageInfo
from llamaclust.cluster.membership.worker_handle import WorkerHandle
from llamaclust.core.errors import LlamaclustError, WorkerError

_BLAME_S = 1.0
"""A stream breaks before the loss of the worker behind it is known."""


def stage_of(epoch: int, worker: WorkerHandle) -> StageInfo:
    order, _ = worker.stages[epoch]
    return StageInfo(worker.name, order.start, order.end)


def lost_in(epoch: int, workers: Sequence[WorkerHandle]) -> list[WorkerHandle]:
    """Those of an epoch that are lost, the cause first: whom another one's stage could not reach, then in the order in
    which they were lost."""
    unreached = {worker.unreached(epoch) for worker in workers}
    lost = [worker for worker in workers if worker.loss is not None]
    return sorted(lost, key=lambda worker: (worker.name not in unreached, worker.loss_number))


async def blamed(epoch: int, workers: Sequence[WorkerHandle], ended: LlamaclustError | None) -> LlamaclustError:
    """The loss of a worker, if there is one or will be in a moment; else what a stream ended with, as soon as it is
    known that workers who live cannot reach each other."""
    news: list[asyncio.Task[bool]] = [asyncio.create_task(worker.lost.wait()) for worker in workers]
    news += [asyncio.create_task(_is_cut_off(epoch, worker, workers)) for worker in workers]
    await asyncio.wait(news, timeout=_BLAME_S, return_when=asyncio.FIRST_COMPLETED)
    for task in news:
        task.cancel()
    if lost := lost_in(epoch, workers):
        return lost[0].error
    stages = (stage_of(epoch, worker) for worker in workers)
    names = ", ".join(f"{stage.worker} [{stage.start}, {stage.end})" for stage in stages)
    error = WorkerError(f"the pipeline of workers {names} broke: {ended}")
    error.worker = None if ended is None else ended.worker
    return error


async def _is_cut_off(epoch: int, worker: WorkerHandle, workers: Sequence[WorkerHandle]) -> bool:
    """Returns when it has said that it cannot reach another one who shows life; one that has ended cannot be reached
    either, and is the cause itself."""
    await worker.cut_off(epoch).wait()
    other = next((one for one in workers if one.name == worker.unreached(epoch)), None)
    return other is None or await other.shows_life()

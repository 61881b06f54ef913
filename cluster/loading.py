"""Loads a plan's stages on their workers, all at the same time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from llamaclust.cluster.pipeline import StageInfo
from llamaclust.cluster.worker_handle import WorkerHandle
from llamaclust.wire.control import Load, LoadProgress, StageLimits

OnProgress = Callable[[str, LoadProgress], None]
"""Called with the name of a worker and how far it is."""


async def load_stages(
    epoch: int,
    stages: Sequence[StageInfo],
    workers: Mapping[str, WorkerHandle],
    *,
    model_path: str,
    model_id: str,
    limits: StageLimits | Mapping[str, StageLimits],
    on_progress: OnProgress = lambda worker, progress: None,
) -> tuple[WorkerHandle, ...]:
    """The workers in the order of their stages, which are ready to serve `epoch`. `limits`: of all, or by worker.

    The first error of a worker is raised when all have answered; then stages that did load are freed.
    """
    handles = tuple(workers[stage.worker] for stage in stages)
    reached = [*((handle.registration.address, handle.name) for handle in handles), (None, None)]
    loads = []
    for stage, handle, (address, name) in zip(stages, handles, reached[1:], strict=True):
        own = limits if isinstance(limits, StageLimits) else limits[stage.worker]
        first, first_name = reached[0] if address is None and len(stages) > 1 else (None, None)
        layers = (stage.start, stage.end)
        order = Load(epoch, model_path, model_id, *layers, own, address, first, name, first_name)
        loads.append(handle.load(order, partial(on_progress, stage.worker)))
    errors = [one for one in await asyncio.gather(*loads, return_exceptions=True) if isinstance(one, BaseException)]
    if errors:
        await unload_stages(epoch, handles)
        raise errors[0]
    return handles


async def unload_stages(epoch: int, workers: Sequence[WorkerHandle]) -> None:
    """Frees the stages of an epoch on those workers that have it and are there."""
    present = [worker for worker in workers if epoch in worker.stages and worker.loss is None]
    await asyncio.gather(*(worker.unload(epoch) for worker in present))

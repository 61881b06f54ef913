"""Loads a plan's stages on their workers, all at the same time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial

from llamaclust.cluster.control.weight_sources import OnReading, weight_sources
from llamaclust.cluster.engine.pipeline import StageInfo
from llamaclust.cluster.membership.worker_handle import STALL_S, WorkerHandle
from llamaclust.cluster.planner.links import UNKNOWN, Links
from llamaclust.core.errors import WorkerError
from llamaclust.core.limits import StageLimits
from llamaclust.wire.control.messages import Load, LoadProgress

OnProgress = Callable[[str, LoadProgress], None]
"""Called with the name of a worker and how far it is."""

OnError = Callable[[WorkerHandle, BaseException], None]
"""Called with a worker that did not load and why."""


async def load_stages(
    epoch: int,
    stages: Sequence[StageInfo],
    workers: Mapping[str, WorkerHandle],
    *,
    model_path: str,
    model_id: str,
    limits: StageLimits,
    alone: bool = False,
    links: Links = UNKNOWN,
    on_progress: OnProgress = lambda worker, progress: None,
    on_reading: OnReading = lambda worker, progress: None,
    on_error: OnError = lambda worker, error: None,
    stall_s: float = STALL_S,
) -> tuple[WorkerHandle, ...]:
    """The workers in the order of their stages, which are ready to serve `epoch`. `alone`: these workers' stages of
    other epochs are freed first, all but the weights that still serve; `stall_s`: so long one may get no further;
    `links`: for who fetches weights; `on_reading` hears of who reads a file for others.

    The first error of a worker is raised when all have answered. Then stages that did load are freed, except `alone`:
    their weights may be what the next epoch needs.
    """
    handles = tuple(workers[stage.worker] for stage in stages)
    loading = [stage.worker for stage in stages]
    weights = await weight_sources(loading, workers, model_path, model_id, links, on_reading, stall_s)
    loads = []
    for index, (stage, handle) in enumerate(zip(stages, handles, strict=True)):
        layers, fetched = (stage.start, stage.end), weights.get(stage.worker)
        order = Load(
            epoch, model_path, model_id, *layers, limits, None, exclusive=alone, weights=fetched, devices=stage.devices
        )
        order = _with_neighbours(order, handles, index)
        loads.append(handle.load(order, partial(on_progress, stage.worker), stall_s))
    answers = await asyncio.gather(*loads, return_exceptions=True)
    errors = [(handle, one) for handle, one in zip(handles, answers, strict=True) if isinstance(one, BaseException)]
    for handle, error in errors:
        on_error(handle, error)
    if errors:
        if not alone:
            await unload_stages(epoch, handles)
        raise errors[0][1]
    return handles


def _with_neighbours(order: Load, handles: Sequence[WorkerHandle], index: int) -> Load:
    """With the stages that the one at `index` calls and is called by."""
    is_first, is_last = index == 0, index + 1 == len(handles)
    following = None if is_last else handles[index + 1]
    first = handles[0] if is_last and not is_first else None
    return replace(
        order,
        next_address=following.registration.address if following else None,
        next_worker=following.name if following else None,
        first_address=first.registration.address if first else None,
        first_worker=first.name if first else None,
        previous_worker=None if is_first else handles[index - 1].name,
        last_worker=handles[-1].name if is_first and not is_last else None,
    )


async def unload_stages(epoch: int, workers: Iterable[WorkerHandle]) -> None:
    """Frees the stages of an epoch on those workers that have it and are there."""
    present = [worker for worker in workers if epoch in worker.stages and worker.loss is None]
    await asyncio.gather(*(_unload(worker, epoch) for worker in present))


async def _unload(worker: WorkerHandle, epoch: int) -> None:
    try:
        await worker.unload(epoch)
    except WorkerError:
        if worker.loss is None:  # what is lost holds nothing any more
            raise

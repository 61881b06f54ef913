"""Loads a plan's stages on their workers, concurrently."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

from llamaclust.cluster.control.observations import Suspect
from llamaclust.cluster.control.weight_sources import ModelReference, weight_sources
from llamaclust.cluster.engine.pipeline import StageInfo
from llamaclust.cluster.membership.worker_handle import PROGRESS_TIMEOUT_S, WorkerHandle
from llamaclust.cluster.planner.links import UNKNOWN, Links
from llamaclust.core.errors import LlamaclustError, WorkerError
from llamaclust.core.limits import StageLimits
from llamaclust.wire.control.messages import FindWeightsProgress, Load, Loaded, LoadProgress


class LoadObserver(Protocol):
    """Observes how far workers are."""

    def loading(self, worker: str, progress: LoadProgress) -> None: ...

    def reading(self, worker: str, progress: FindWeightsProgress) -> None:
        """The worker reads its model file for others."""
        ...


class StageLoadError(Exception):
    """Workers that did not load. `error` is the first one's."""

    def __init__(self, error: LlamaclustError, suspects: tuple[Suspect, ...]) -> None:
        super().__init__(str(error))
        self.error = error
        self.suspects = suspects


@dataclass(frozen=True, slots=True)
class StageLoads:
    """The stages of an epoch. `is_exclusive`: the workers' stages of other epochs are freed first, except weights that
    serve again. `links` order the sources of weights."""

    epoch: int
    stages: Sequence[StageInfo]
    model: ModelReference
    limits: StageLimits
    is_exclusive: bool = False
    links: Links = UNKNOWN
    progress_timeout_s: float = PROGRESS_TIMEOUT_S


async def load_stages(
    loads: StageLoads, workers: Mapping[str, WorkerHandle], observer: LoadObserver | None = None
) -> tuple[WorkerHandle, ...]:
    """The workers in the order of their stages, ready to serve the epoch.

    StageLoadError once all have answered, where a worker failed. Then loaded stages are freed, except `is_exclusive`:
    the next epoch may need their weights.
    """
    handles = tuple(workers[stage.worker] for stage in loads.stages)
    names = [handle.name for handle in handles]
    timeout_s = loads.progress_timeout_s
    weights = await weight_sources(
        names, workers, loads.model, links=loads.links, observer=observer, progress_timeout_s=timeout_s
    )
    orders = [
        replace(order, weights=weights.get(name)) for name, order in zip(names, _orders(loads, handles), strict=True)
    ]
    answers = await asyncio.gather(
        *(
            handle.load(order, None if observer is None else partial(observer.loading, handle.name), timeout_s)
            for handle, order in zip(handles, orders, strict=True)
        ),
        return_exceptions=True,
    )
    errors = _errors(handles, answers)
    if errors:
        if not loads.is_exclusive:
            await unload_stages(loads.epoch, handles)
        raise StageLoadError(errors[0][1], tuple(Suspect(handle.name, error) for handle, error in errors))
    return handles


def _errors(
    handles: Sequence[WorkerHandle], answers: Sequence[Loaded | BaseException]
) -> list[tuple[WorkerHandle, LlamaclustError]]:
    """Any other exception is a bug, and raised."""
    errors = []
    for handle, answer in zip(handles, answers, strict=True):
        if isinstance(answer, LlamaclustError):
            errors.append((handle, answer))
        elif isinstance(answer, BaseException):
            raise answer
    return errors


def _orders(loads: StageLoads, handles: Sequence[WorkerHandle]) -> list[Load]:
    """In the order of the stages."""
    orders = []
    for index, stage in enumerate(loads.stages):
        order = Load(
            loads.epoch,
            loads.model.path,
            loads.model.model_id,
            stage.start,
            stage.end,
            loads.limits,
            None,
            exclusive=loads.is_exclusive,
            devices=stage.devices,
        )
        orders.append(_with_neighbours(order, handles, index))
    return orders


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
    """Frees the stages of an epoch on those workers that have it and are present."""
    present = [worker for worker in workers if epoch in worker.stages and worker.loss is None]
    await asyncio.gather(*(_unload(worker, epoch) for worker in present))


async def _unload(worker: WorkerHandle, epoch: int) -> None:
    try:
        await worker.unload(epoch)
    except WorkerError:
        if worker.loss is None:  # a lost worker holds nothing
            raise

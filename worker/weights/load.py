"""Loads a stage as the coordinator ordered it, with progress: from the model file, or from what other workers have of
that."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import astuple, dataclass

from llamaclust.core.errors import InsufficientMemoryError, ModelFileError
from llamaclust.core.gpus import DeviceLayers
from llamaclust.core.sizes import missing
from llamaclust.model.loader import Model
from llamaclust.wire.control.messages import Load, LoadProgress
from llamaclust.worker.devices.devices import Device
from llamaclust.worker.stage.stage_runner import (
    StageMemory,
    StageOptions,
    StageRunner,
    held_weight_bytes,
    model_program,
    plan_memory,
)
from llamaclust.worker.weights.remote_model import RemoteModel
from llamaclust.worker.weights.weights import Reach, Weights

_log = logging.getLogger(__name__)

Report = Callable[[LoadProgress], Awaitable[None]]
_REPORT_S = 0.1


@dataclass(slots=True)
class _Progress:
    """Of fetching and loading together."""

    total_bytes: int = 0
    done_bytes: int = 0

    def add(self, more_bytes: int) -> None:
        self.done_bytes += more_bytes


async def load_stage(order: Load, device: Device, report: Report, weights: Weights, reach: Reach) -> StageRunner:
    """The stage of `order`. ModelFileError for a missing, another or a damaged file, InsufficientMemoryError where
    memory is short; what `RemoteModel` raises where there is no file."""
    progress = _Progress()
    loading = asyncio.create_task(_load(order, device, weights, reach, progress))
    try:
        while not (await asyncio.wait((loading,), timeout=_REPORT_S))[0]:
            total_bytes = max(progress.total_bytes, 1)
            await report(LoadProgress(order.epoch, min(progress.done_bytes, total_bytes), total_bytes))
    finally:
        loading.cancel()
    return loading.result()


async def _load(order: Load, device: Device, weights: Weights, reach: Reach, progress: _Progress) -> StageRunner:
    model = await asyncio.to_thread(_open, order, weights)
    if model is not None:
        progress.total_bytes = (await asyncio.to_thread(_planned, order, device, model)).weight_bytes
        return await asyncio.to_thread(_runner, order, device, model, progress)
    assert order.weights is not None
    sources = {one.worker: reach(one.address, one.worker) for one in order.weights.sources}
    async with RemoteModel(order.model_path, order.model_id, order.weights, weights, sources, progress.add) as absent:
        outline = await absent.outline()
        planned = await asyncio.to_thread(_planned, order, device, outline)
        names = model_program(outline, order.start, order.end, order.limits).weights
        progress.done_bytes, progress.total_bytes = 0, planned.weight_bytes + absent.missing_bytes(names)
        model = await absent.complete(names)
        return await asyncio.to_thread(_runner, order, device, model, progress)


def _open(order: Load, weights: Weights) -> Model | None:
    """The file; None where there is none and the weights may be fetched."""
    try:
        model = weights.open_file(order.model_path, order.model_id)
    except ModelFileError as error:
        if order.weights is None:
            raise
        _log.warning("%s; its layers are fetched from other workers", error)
        return None
    if model is None and order.weights is None:
        where = " and ".join(str(place) for place in weights.places(order.model_path))
        what = "no such file on this machine, and no other worker has it or may give it"
        raise ModelFileError(f"{where}: {what}; copy it there, or name its folder by --model-dir")
    return model


def _planned(order: Load, device: Device, model: Model) -> StageMemory:
    """What the stage will take, on all devices together. InsufficientMemoryError names one that has too little."""
    parts = [_part(one, order, device, model) for one in device.layers(order)]
    return StageMemory(*(sum(sizes) for sizes in zip(*map(astuple, parts), strict=True)))


def _part(one: DeviceLayers, order: Load, device: Device, model: Model) -> StageMemory:
    backend = device.backend_of(one.device)
    planned = plan_memory(backend, model, one.start, one.end, order.limits)
    held_bytes = held_weight_bytes(backend, model, one.start, one.end, order.limits)
    free_bytes = device.free_bytes_of(one.device) + held_bytes
    if planned.total_bytes > free_bytes:
        where = f"on {one.device}, " if order.devices else ""
        raise InsufficientMemoryError(
            f"{where}layers [{one.start}, {one.end}) need {missing(planned.parts, free_bytes)}"
        )
    return planned


def _runner(order: Load, device: Device, model: Model, progress: _Progress) -> StageRunner:
    return StageRunner(
        device.backend_for(order),
        model,
        order.start,
        order.end,
        order.limits,
        StageOptions(device.feature_level, device.threads, order.devices, progress.add),
    )

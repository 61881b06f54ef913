"""Loads a stage as the coordinator ordered it, with progress: from the model file, or from what other workers have of
that."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import astuple

from llamaclust.core.errors import InsufficientMemoryError, ModelFileError
from llamaclust.core.sizes import missing
from llamaclust.model.loader import Model
from llamaclust.model.shard_names import whole_name
from llamaclust.wire.control.messages import Load, LoadProgress
from llamaclust.worker.devices.device_memory import device_shares
from llamaclust.worker.devices.devices import Device
from llamaclust.worker.devices.system_info import release_freed_memory
from llamaclust.worker.stage.nextn import nextn_program_of
from llamaclust.worker.stage.stage_runner import StageMemory, StageOptions, StageRunner, model_program, portion_of
from llamaclust.worker.weights.remote_model import RemoteModel
from llamaclust.worker.weights.weights import Progress, Reach, Weights

_log = logging.getLogger(__name__)

Report = Callable[[LoadProgress], Awaitable[None]]
_REPORT_S = 0.1


async def load_stage(order: Load, device: Device, report: Report, weights: Weights, reach: Reach) -> StageRunner:
    """The stage of `order`. ModelFileError for a missing, another or a damaged file, InsufficientMemoryError where
    memory is short; what `RemoteModel` raises where there is no file."""

    async def progressed(done_bytes: int, total_bytes: int) -> None:
        if total_bytes:
            weight_bytes = progress.weight_bytes or total_bytes
            done_bytes = min(done_bytes, total_bytes) * weight_bytes // total_bytes
            await report(LoadProgress(order.epoch, done_bytes, weight_bytes))

    progress = Progress()  # of fetching and loading together
    return await progress.during(_load(order, device, weights, reach, progress), progressed, _REPORT_S)


async def _load(order: Load, device: Device, weights: Weights, reach: Reach, progress: Progress) -> StageRunner:
    model = await asyncio.to_thread(_open, order, weights, progress)
    if model is not None:
        model = _in_tiles(order, model)
        planned = await asyncio.to_thread(_planned, order, device, model)
        progress.done_bytes, progress.total_bytes = 0, planned.weight_bytes
        return await _in_thread(order, device, model, progress)
    assert order.weights is not None
    sources = {source.worker: reach(source) for source in order.weights.sources}
    async with RemoteModel(order.model_path, order.model_id, order.weights, weights, sources, progress.add) as remote:
        outline = _in_tiles(order, await remote.outline())
        planned = await asyncio.to_thread(_planned, order, device, outline)
        program = model_program(outline, order.start, order.end, order.limits, portion_of(order))
        own = nextn_program_of(outline, order.limits).weights if order.limits.nextn and program.is_last else ()
        names = tuple(dict.fromkeys(map(whole_name, (*program.weights, *own))))
        progress.done_bytes, progress.total_bytes = 0, planned.weight_bytes + remote.missing_bytes(names)
        progress.weight_bytes = planned.weight_bytes
        model = _in_tiles(order, await remote.complete(names))
        return await _in_thread(order, device, model, progress)


async def _in_thread(order: Load, device: Device, model: Model, progress: Progress) -> StageRunner:
    """Where this is cancelled, it returns when the thread has ended, which its next progress does. Otherwise the thread
    would keep the next load waiting, and its memory."""
    running = asyncio.ensure_future(asyncio.to_thread(_runner, order, device, model, progress))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        progress.cancel()
        await asyncio.gather(running, return_exceptions=True)
        raise


def _open(order: Load, weights: Weights, progress: Progress) -> Model | None:
    """The file; None where there is none, or one of other bytes, and the weights may be fetched."""
    try:
        model = weights.open_file(order.model_path, order.model_id, order.adapter_paths)
        if model is not None and order.weights is not None:
            _check_bytes(model, order.weights.manifest, weights, progress)
    except ModelFileError as error:
        if order.weights is None or not order.weights.sources:
            raise
        _log.error("%s; its layers are fetched from others", error)
        return None
    if model is None and order.weights is None:
        paths = (order.model_path, *filter(None, order.adapter_paths))
        where = " and ".join(str(place) for path in paths for place in weights.places(path))
        what = "no such file on this machine, and neither the coordinator nor another worker may give it"
        raise ModelFileError(f"{where}: {what}; copy it there, or name its folder by --model-dir")
    return model


def _check_bytes(model: Model, manifest: str, weights: Weights, progress: Progress) -> None:
    """ModelFileError for a file of other bytes than those of the manifest."""
    own = weights.manifest_of(model, progress).content
    if own != manifest:
        what = f"its bytes are not those that the cluster computes with: SHA-256 {own[:12]}, not {manifest[:12]}"
        raise ModelFileError(f"{model.file.path}: {what}; it is damaged or was changed, replace it by a good copy")


def _in_tiles(order: Load, model: Model) -> Model:
    return model.widened if order.limits.wide_tiles else model


def _planned(order: Load, device: Device, model: Model) -> StageMemory:
    """What the stage will take, on all devices together. InsufficientMemoryError names one that has too little."""
    shares = device_shares(device, model, device.layers(order), order.limits, portion_of(order))
    release_freed_memory()
    for name, share in shares.items():
        free_bytes = device.free_bytes_of(name) + share.memory.held_weight_bytes
        if share.memory.total_bytes > free_bytes:
            where = f"on {name}, " if order.devices else ""
            needs = missing(share.memory.parts, free_bytes)
            raise InsufficientMemoryError(f"{where}{share.layers} need {needs}")
    memories = (astuple(share.memory) for share in shares.values())
    return StageMemory(*map(sum, zip(*memories, strict=True)))


def _runner(order: Load, device: Device, model: Model, progress: Progress) -> StageRunner:
    portion = portion_of(order)  # two epochs of a group may not wait for each other's steps
    backend = device.backend_for(device.layers(order), apart=portion is not None)
    manifest = None if order.weights is None else order.weights.manifest
    options = StageOptions(
        device.feature_level, device.threads, order.devices, progress.add, device.backend, manifest, portion
    )
    return StageRunner(backend, model, order.start, order.end, order.limits, options)

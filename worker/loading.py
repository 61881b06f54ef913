"""Loads a stage as the coordinator ordered it, on a thread of its own, with progress."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

from llamaclust.errors import DoesNotFitError, ModelFileError
from llamaclust.model.loader import Model
from llamaclust.sizes import missing
from llamaclust.wire.control import Load, LoadProgress
from llamaclust.worker.devices import Device
from llamaclust.worker.stage_runner import StageMemory, StageRunner, held_weight_bytes, plan_memory

Report = Callable[[LoadProgress], Awaitable[None]]

_REPORT_S = 0.1


async def load_stage(order: Load, device: Device, report: Report, model_dir: Path | None = None) -> StageRunner:
    """The stage of `order`; the file is looked for where the order says, then under its name in `model_dir`.

    ModelFileError for a missing, another or a damaged file, DoesNotFitError where memory is short.
    """
    limits = order.limits
    model = await asyncio.to_thread(_open, order, model_dir)
    planned = await asyncio.to_thread(plan_memory, device.backend, model, order.start, order.end, limits)
    held_bytes = held_weight_bytes(device.backend, model, order.start, order.end, limits)
    _check_memory(order, planned, device.free_memory_bytes + held_bytes)
    done_bytes = 0

    def progress(more_bytes: int) -> None:
        nonlocal done_bytes
        done_bytes += more_bytes

    def load() -> StageRunner:
        return StageRunner(
            device.backend,
            model,
            order.start,
            order.end,
            limits,
            feature_level=device.feature_level,
            threads=device.threads,
            progress=progress,
        )

    loading = asyncio.ensure_future(asyncio.to_thread(load))
    while not (await asyncio.wait((loading,), timeout=_REPORT_S))[0]:
        total_bytes = planned.weight_bytes
        await report(LoadProgress(order.epoch, min(done_bytes, total_bytes), total_bytes))
    return loading.result()


def _open(order: Load, model_dir: Path | None) -> Model:
    """The file of the order's size and hash."""
    path = Path(order.model_path)
    places = [path] if model_dir is None else [path, model_dir / path.name]
    there = [place for place in places if place.is_file()]
    for place in there:
        model = Model.open(place)
        if model.model_id == order.model_id:
            return model
        model.close()
    if there:
        what = "not the file that the coordinator opened: it was changed or replaced"
        raise ModelFileError(f"{there[0]}: {what}; restore it, or start the cluster again")
    missing = " and ".join(str(place) for place in places)
    raise ModelFileError(f"{missing}: no such file on this machine; copy it there, or name its folder by --model-dir")


def _check_memory(order: Load, planned: StageMemory, free_bytes: int) -> None:
    if planned.total_bytes > free_bytes:
        raise DoesNotFitError(f"layers [{order.start}, {order.end}) need {missing(planned.parts, free_bytes)}")

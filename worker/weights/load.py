"""Loads a stage, adapters or an encoder as the coordinator orders, from local files or from other workers."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import astuple, dataclass
from functools import partial

from llamaclust.core.errors import InsufficientMemoryError, ModelFileError
from llamaclust.core.limits import StageLimits
from llamaclust.core.sizes import missing
from llamaclust.model.adapters import own_names
from llamaclust.model.gguf.model_file import ModelFile
from llamaclust.model.loader import Model
from llamaclust.model.projectors.projector import projector_of
from llamaclust.model.shard_names import whole_name
from llamaclust.wire.control.messages import Load
from llamaclust.wire.control.weights import AdapterFile, EncoderFile, WeightSources
from llamaclust.worker.devices.device_memory import device_shares
from llamaclust.worker.devices.devices import Device
from llamaclust.worker.devices.encoder_limits import EncoderMemory
from llamaclust.worker.devices.encoder_memory import encoder_bytes
from llamaclust.worker.devices.system_info import release_freed_memory
from llamaclust.worker.encoder.tile_encoder import TileEncoder
from llamaclust.worker.stage.nextn import nextn_program_of
from llamaclust.worker.stage.stage_runner import StageMemory, StageOptions, StageRunner, model_program, portion_of
from llamaclust.worker.weights.remote_file import RemoteFile
from llamaclust.worker.weights.weights import Progress, Reach, Weights

_log = logging.getLogger(__name__)

_REPORT_S = 0.1


async def load_stage(
    order: Load, device: Device, progress: Progress, weights: Weights, reach: Reach, reserved_bytes: int = 0
) -> StageRunner:
    """Loads a stage, and leaves `reserved_bytes` of memory free. Raises LlamaclustError, for example ModelFileError."""
    files = _Files(weights, reach, progress)
    return await progress.during(_load(order, device, files, reserved_bytes), _REPORT_S)


async def load_encoder(
    wanted: EncoderFile, device: Device, progress: Progress, weights: Weights, reach: Reach
) -> TileEncoder:
    return await progress.during(_load_encoder(wanted, device, _Files(weights, reach, progress)), _REPORT_S)


async def _load_encoder(wanted: EncoderFile, device: Device, files: _Files) -> TileEncoder:
    async with files:
        opened = await files.open_projector_file(wanted)
        outline = await asyncio.to_thread(projector_of, opened.file)
        planned = await asyncio.to_thread(encoder_bytes, outline, device.threads)
        release_freed_memory()
        held_bytes = device.backend.held_bytes(outline.program, outline.tensors)
        if planned.total_bytes > (free_bytes := device.free_memory_bytes + held_bytes):
            what = f"the encoder of {outline.file.path} needs {missing(planned.parts, free_bytes)}"
            raise InsufficientMemoryError(what)
        progress, missing_bytes = files.progress, opened.missing_bytes(outline.read_names)
        progress.begin(planned.weight_bytes + missing_bytes, planned.weight_bytes)
        await opened.complete(outline.read_names)
        return await progress.in_thread(partial(_encoder, wanted, device, opened.file, planned, progress))


def _encoder(
    wanted: EncoderFile, device: Device, file: ModelFile, memory: EncoderMemory, progress: Progress
) -> TileEncoder:
    manifest = None if wanted.weights is None else wanted.weights.manifest
    return TileEncoder(device.encoder_backend, projector_of(file), memory, manifest, progress.add)


async def _load(order: Load, device: Device, files: _Files, reserved_bytes: int) -> StageRunner:
    async with files:
        plain, progress = await files.open_model(order), files.progress
        adapters = await files.open_adapters(order.adapters, plain.file)
        outline = _in_tiles(order.limits, Model(plain.file, adapters=_files_of(adapters)))
        planned = await asyncio.to_thread(_planned, order, device, outline, reserved_bytes)
        program = model_program(outline, order.start, order.end, order.limits, portion_of(order))
        own = nextn_program_of(outline, order.limits).weights if order.limits.nextn and program.is_last else ()
        names = tuple(dict.fromkeys(map(whole_name, (*program.weights, *own))))
        missing_bytes = sum(opened.missing_bytes(names) for opened in (plain, *adapters.values()))
        progress.begin(planned.weight_bytes + missing_bytes, planned.weight_bytes)
        for opened in (plain, *adapters.values()):
            await opened.complete(names)
        model = _in_tiles(order.limits, Model(plain.file, adapters=_files_of(adapters)))
        return await progress.in_thread(partial(_runner, order, device, model, progress))


async def load_adapters(
    wanted: Sequence[AdapterFile], runner: StageRunner, device: Device, weights: Weights, reach: Reach
) -> None:
    """Replaces the stage's adapters for later microbatches. Raises the errors of `load_stage`."""
    async with _Files(weights, reach, Progress()) as files:
        adapters = await files.open_adapters(wanted, runner.model.plain)
        names = runner.program_of(runner.model.adapted_by(_files_of(adapters))).weights
        for opened in adapters.values():
            await opened.complete(names)
        model = _in_tiles(runner.limits, runner.model.adapted_by(_files_of(adapters)))
        release_freed_memory()
        free_bytes = device.free_bytes_of(runner.devices[0].device if runner.devices else "cpu")
        await files.progress.in_thread(partial(runner.adapt, model, free_bytes, files.progress.add))


@dataclass(slots=True)
class _Opened:
    file: ModelFile
    number: int | None = None  # Number of the adapter, or None for another file.
    remote: RemoteFile | None = None

    def missing_bytes(self, names: Iterable[str]) -> int:
        return 0 if self.remote is None else self.remote.missing_bytes(own_names(names, self.number))

    async def complete(self, names: Iterable[str]) -> None:
        if self.remote is not None:
            self.file = await self.remote.complete(own_names(names, self.number))


def _files_of(adapters: Mapping[int, _Opened]) -> dict[int, ModelFile]:
    return {number: opened.file for number, opened in adapters.items()}


class _Files(AsyncExitStack):
    """The files of a load. Fetched weights are kept while the context lasts."""

    def __init__(self, weights: Weights, reach: Reach, progress: Progress) -> None:
        super().__init__()
        self.progress = progress
        self._weights = weights
        self._reach = reach

    async def open_model(self, order: Load) -> _Opened:
        read = partial(self._weights.open_file, order.model_path, order.model_id)
        return await self._open(read, order.model_path, order.model_id, order.weights)

    async def open_projector_file(self, wanted: EncoderFile) -> _Opened:
        read = partial(self._weights.open_projector_file, wanted)
        return await self._open(read, wanted.path, wanted.file_id, wanted.weights)

    async def open_adapters(self, wanted: Sequence[AdapterFile], plain: ModelFile) -> dict[int, _Opened]:
        found = {}
        for adapter in wanted:
            read = partial(self._weights.open_adapter, adapter, plain)
            found[adapter.number] = await self._open(read, adapter.path, adapter.adapter_id, adapter.weights)
            found[adapter.number].number = adapter.number
        return found

    async def _open(
        self, read: Callable[[], ModelFile | None], path: str, identity: str, known: WeightSources | None
    ) -> _Opened:
        file = await self.progress.in_thread(partial(self._here, read, path, known))
        if file is not None:
            return _Opened(file)
        assert known is not None
        sources = {source.worker: self._reach(source) for source in known.sources}
        remote = RemoteFile(path, identity, known, self._weights, sources, self.progress.add)
        await self.enter_async_context(remote)
        return _Opened(await remote.outline(), remote=remote)

    def _here(self, read: Callable[[], ModelFile | None], path: str, known: WeightSources | None) -> ModelFile | None:
        """Returns this machine's file, or None if its weights must be fetched instead. May raise ModelFileError."""
        try:
            file = read()
            if file is not None and known is not None:
                self._check_bytes(file, known.manifest)
        except ModelFileError as error:
            if known is None or not known.sources:
                raise
            _log.error("%s; its layers are fetched from other machines", error)
            return None
        if file is None and known is None:
            where = " and ".join(map(str, self._weights.places(path)))
            what = "no such file on this machine, and neither the coordinator nor another worker may send it"
            raise ModelFileError(f"{where}: {what}; copy it there, or name its folder with --model-dir")
        return file

    def _check_bytes(self, file: ModelFile, manifest: str) -> None:
        own = self._weights.manifest_of(file, self.progress).content
        if own != manifest:
            what = f"its bytes differ from the cluster's copies (SHA-256 {own[:12]}, not {manifest[:12]})"
            raise ModelFileError(f"{file.path}: {what}, so it is damaged or was changed; replace it by a good copy")


def _in_tiles(limits: StageLimits, model: Model) -> Model:
    return model.widened if limits.wide_tiles else model


def _planned(order: Load, device: Device, model: Model, reserved_bytes: int) -> StageMemory:
    shares = device_shares(device, model, device.layers(order), order.limits, portion_of(order))
    release_freed_memory()
    for name, share in shares.items():
        free_bytes = device.free_bytes_of(name) + share.memory.held_weight_bytes
        free_bytes -= reserved_bytes if name == "cpu" else 0
        if share.memory.total_bytes > free_bytes:
            where = f"on {name}, " if order.devices else ""
            needs = missing(share.memory.parts, free_bytes)
            raise InsufficientMemoryError(f"{where}{share.layers} need {needs}")
    memories = (astuple(share.memory) for share in shares.values())
    return StageMemory(*map(sum, zip(*memories, strict=True)))


def _runner(order: Load, device: Device, model: Model, progress: Progress) -> StageRunner:
    # A group's stage gets its own threads, because two epochs of a group must not wait for each other's steps.
    portion = portion_of(order)
    backend = device.backend_for(device.layers(order), apart=portion is not None)
    manifest = None if order.weights is None else order.weights.manifest
    options = StageOptions(
        device.feature_level, device.threads, order.devices, progress.add, device.backend, manifest, portion
    )
    return StageRunner(backend, model, order.start, order.end, order.limits, options)

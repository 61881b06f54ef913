"""Adapters that clients load while a model is served: which files are allowed, their numbers, their record."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from llamaclust.cluster.api.errors import HttpError
from llamaclust.cluster.config.cluster_config import ClusterConfig
from llamaclust.cluster.control.model_versions import ModelVersions
from llamaclust.cluster.state.adapters import AdapterRecord, ServedAdapter, ServedAdapters
from llamaclust.cluster.state.events import Notice, Report
from llamaclust.core.errors import LlamaclustError, ModelFileError, ParameterError
from llamaclust.core.limits import MAX_ADAPTERS
from llamaclust.model.adapters import check_adapter_weights, is_adapter, read_adapter, with_adapters
from llamaclust.model.gguf.model_file import open_model
from llamaclust.model.loader import Model

_MOST_SHOWN = 200
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class OpenedModel:
    """`config`: the cluster as this model has it. `plain`: with the adapters of the cluster file alone; `version`: also
    with those that clients loaded before the start, all of which are `adapters`."""

    config: ClusterConfig
    plain: Model
    version: Model
    adapters: ServedAdapters

    @classmethod
    async def restore(cls, config: ClusterConfig, plain: Model, record: AdapterRecord, report: Report) -> OpenedModel:
        """With the adapters of the record that are there and unchanged; a notice names the others."""
        first = [ServedAdapter(adapter.name, str(adapter.path), adapter.scale) for adapter in config.adapters]
        adapters, version = ServedAdapters(first), plain
        folder = config.api.adapter_folder
        for number, adapter in record.of(config.model_name) if folder is not None else ():
            assert folder is not None
            try:
                number = number if number not in adapters.numbers else _free_number(adapters)
                found, opened = await asyncio.to_thread(_opened, plain, folder, adapters, number, adapter)
                if found.content != adapter.content:
                    raise ModelFileError(f"{adapter.path}: another file than the one that was loaded")
            except LlamaclustError as error:
                report(Notice(f"adapter {adapter.name!r} is not loaded again: {error}"))
                continue
            adapters.add(number, found)
            version = opened
        return cls(config, plain, version, adapters)


@dataclass(eq=False, slots=True)
class AdapterLoader:
    """Of one model. One change at a time."""

    model: OpenedModel
    versions: ModelVersions
    _record: AdapterRecord
    _report: Report
    others: Sequence[AdapterLoader] = ()  # of all models
    _turn: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def load(self, name: str, path: str) -> None:
        """Returns when requests may use the adapter. ParameterError for a name or a path that is not allowed, HttpError
        404 where there is no adapter, 503 while the model sleeps; ModelFileError, InsufficientMemoryError and what else
        makes a load fail: then everything is as before."""
        folder, adapters = self.model.config.api.adapter_folder, self.model.adapters
        assert folder is not None
        async with self._turn:
            self._check_name(name)
            if self.versions.is_asleep:
                what = f"model {self.model.config.model_name!r} is not loaded"
                raise HttpError(503, "model_not_loaded", f"{what}: load it by /v1/models/load, then try again")
            number, wanted = _free_number(adapters), ServedAdapter(name, path)
            adapter, version = await asyncio.to_thread(_opened, self.model.plain, folder, adapters, number, wanted)
            self._check_version(version)
            before = self.versions.wanted
            await self.versions.replace(version)
            try:
                await self._record.write(self.model.config.model_name, [*adapters.loaded, (number, adapter)])
            except LlamaclustError:
                await self.versions.replace(before)
                raise
            adapters.add(number, adapter)
        self._report(Notice(f"a client loaded adapter {number} {name!r}: {adapter.path}"))

    def _check_name(self, name: str) -> None:
        if name in self.model.adapters.names:
            raise ParameterError("lora_name", f"adapter {name!r} is loaded already: unload it first, or choose another")
        configs = [other.model.config for other in self.others]
        models = {named for config in configs for named in (config.model_name, *config.api.aliases)}
        if name in models or any(name in other.model.adapters.names for other in self.others):
            raise ParameterError("lora_name", f"{name!r} is the name of a model or of another model's adapter")

    def _check_version(self, version: Model) -> None:
        """Models are known by their ids."""
        for other in self.others:
            if other is not self and other.versions.model_id == version.model_id:
                what = f"with it, this is the same model as {other.model.config.model_name!r}: use that one"
                raise ParameterError("lora_path", what)


def _free_number(adapters: ServedAdapters) -> int:
    """ParameterError where there is none."""
    free = next((number for number in range(MAX_ADAPTERS) if number not in adapters.numbers), None)
    if free is None:
        raise ParameterError(
            "lora_name", f"{MAX_ADAPTERS} adapters are loaded, more are not possible: unload one first"
        )
    return free


def _opened(
    plain: Model, folder: Path, adapters: ServedAdapters, number: int, wanted: ServedAdapter
) -> tuple[ServedAdapter, Model]:
    """An adapter with its place and its digest, and the model with it beside the others. Reads all of its weights.
    Raises as `AdapterLoader.load`."""
    path = _allowed(folder, wanted.path)
    base = open_model(plain.file.path)
    paths = {other: Path(adapter.path) for other, adapter in adapters.numbered} | {number: path}
    headers = {other: read_adapter(place, base) for other, place in paths.items()}
    check_adapter_weights([headers[number]])
    numbers = range(max(paths) + 1)
    file = with_adapters(base, [headers.get(other) for other in numbers])
    opened = Model(file, adapter_paths=[paths.get(other) for other in numbers])
    return ServedAdapter(wanted.name, str(path), content=headers[number].digest.hex()), opened


def _allowed(folder: Path, given: str) -> Path:
    """Where an adapter is, links followed. ParameterError outside the folder, HttpError 404 where there is none."""
    shown = repr(given[:_MOST_SHOWN])
    try:
        root, path = folder.resolve(), (folder / given).resolve()
        if not path.is_relative_to(root) or path == root:
            raise ParameterError("lora_path", f"{shown} is not in the folder of adapters (api.adapter_folder)")
        if not is_adapter(path):
            raise HttpError(404, "adapter_not_found", f"lora_path: no adapter is at {shown}", param="lora_path")
    except (OSError, ValueError, RuntimeError) as error:
        raise ParameterError("lora_path", f"{shown} is no path: {type(error).__name__}") from error
    return path

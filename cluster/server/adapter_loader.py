"""Adapters that clients load and unload while a model is served: allowed files, their numbers, their record."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from llamaclust.cluster.config.cluster_config import ClusterConfig
from llamaclust.cluster.config.values import tagged
from llamaclust.cluster.control.limits import check_plan
from llamaclust.cluster.control.model_versions import ModelVersions
from llamaclust.cluster.front.errors import HttpError
from llamaclust.cluster.state.adapters import AdapterRecord, ServedAdapter, ServedAdapters
from llamaclust.cluster.state.events import Notice, Report
from llamaclust.core.errors import LlamaclustError, ModelFileError, ParameterError, UsageError
from llamaclust.core.limits import MAX_ADAPTERS
from llamaclust.model.adapters import (
    adapted_identity,
    adapter_files,
    check_adapter_weights,
    is_adapter,
    read_adapter,
    with_adapters,
)
from llamaclust.model.gguf.header import Header
from llamaclust.model.gguf.model_file import ModelFile, open_model
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
    async def restore(
        cls, config: ClusterConfig, plain: Model, record: AdapterRecord, *, names: set[str], report: Report
    ) -> OpenedModel:
        """With the adapters of the record that are there and unchanged, if their names are not among `names`, which get
        them; a notice names the others."""
        first = [ServedAdapter(adapter.name, str(adapter.path), adapter.scale) for adapter in config.adapters]
        adapters, version = ServedAdapters(first), plain
        folder = config.api.adapter_folder
        for number, adapter in record.of(config.model_name) if folder is not None else ():
            assert folder is not None
            try:
                if adapter.name in names:
                    raise UsageError("a model or another adapter has its name now: rename that and restart")
                free = number if number not in adapters.numbers else _free_number(adapters)
                found, opened = await asyncio.to_thread(_opened, plain, folder, adapters, free, adapter)
                if found.content != adapter.content:
                    raise ModelFileError(f"{adapter.path}: another file than the one that was loaded")
            except LlamaclustError as error:
                report(Notice(f"adapter {adapter.name!r} is not loaded again: {error}"))
                record.keep(config.model_name, number, adapter)
                continue
            names.add(adapter.name)
            adapters.add(free, found)
            version = opened
        return cls(config, plain, version, adapters)


@dataclass(eq=False, slots=True)
class AdapterLoader:
    """Of one model. `_turn`: of the loaders of all models, one change at a time."""

    model: OpenedModel
    versions: ModelVersions
    _record: AdapterRecord
    _report: Report
    others: Sequence[AdapterLoader]  # of all models
    _turn: asyncio.Lock

    async def load(self, name: str, path: str) -> None:
        """Returns when requests may use the adapter. ParameterError for a name or a path that is not allowed, HttpError
        404 where there is no adapter, 503 while the model sleeps; ModelFileError, InsufficientMemoryError and what else
        makes a load fail: then everything is as before."""
        folder, adapters = self.model.config.api.adapter_folder, self.model.adapters
        assert folder is not None
        async with self._turn:
            self._check_name(name)
            self._check_awake()
            number, wanted = _free_number(adapters), ServedAdapter(name, path)
            adapter, version = await asyncio.to_thread(_opened, self.model.plain, folder, adapters, number, wanted)
            await self._replace(version, [*adapters.loaded, (number, adapter)], "lora_path")
            adapters.add(number, adapter)
        self._report(Notice(f"a client loaded adapter {number} {name!r}: {adapter.path}"))

    async def unload(self, name: str) -> None:
        """Returns when the model serves without the adapter, and no start loads it again. HttpError 404 for a name of
        none, 409 while it is used; ParameterError for one of the cluster file; else as `load`."""
        adapters = self.model.adapters
        async with self._turn:
            if name not in adapters.names and await self._record.remove(self.model.config.model_name, name):
                self._report(Notice(f"a client unloaded adapter {name!r}, which was not loaded again at the start"))
                return
            number = self._unloadable(name)
            self._check_awake()
            adapter, before = adapters[number], self.versions.model_id
            adapters.remove(number)  # requests that come meanwhile get 404
            try:
                version = await asyncio.to_thread(_remaining, self.model.plain, adapters)
                await self._replace(version, adapters.loaded, "lora_name")
            except BaseException:
                if self.versions.model_id == before:
                    adapters.add(number, adapter)
                raise
        self._report(Notice(f"a client unloaded adapter {number} {name!r}"))

    async def _replace(self, version: Model, loaded: Sequence[tuple[int, ServedAdapter]], param: str) -> None:
        """Returns when a version with these serves and the record has them; else everything is as before."""
        self._check_version(version, param)
        before = self.versions.wanted
        await self.versions.replace(version)
        try:
            await self._record.write(self.model.config.model_name, loaded)
        except LlamaclustError:
            await self.versions.replace(before)
            raise

    def _unloadable(self, name: str) -> int:
        """The number of an adapter that a client loaded and no request uses."""
        adapters, model = self.model.adapters, self.model.config.model_name
        number = adapters.number_of(name)
        if number is None:
            message = f"lora_name: model {model!r} has no adapter {name[:_MOST_SHOWN]!r}"
            raise HttpError(404, "adapter_not_found", message, param="lora_name")
        if not adapters[number].content:
            raise ParameterError("lora_name", f"{name!r} is an adapter of the cluster file: remove it there")
        if any(number == other for other, _ in adapters.default):
            what = f"adapter {name!r} has a scale in all requests: set it to 0 by POST /lora-adapters first"
            raise HttpError(409, "adapter_in_use", what, param="lora_name")
        if uses := adapters.uses(number):
            requests = "1 request uses" if uses == 1 else f"{uses} requests use"
            what = f"{requests} adapter {name!r}: try again when none does"
            raise HttpError(409, "adapter_in_use", what, param="lora_name")
        return number

    def _check_awake(self) -> None:
        if self.versions.is_asleep:
            what = f"model {self.model.config.model_name!r} is not loaded"
            raise HttpError(503, "model_not_loaded", f"{what}: load it by POST /models/load, then try again")

    def _check_name(self, name: str) -> None:
        """Clients of Ollama write names with a tag: one that differs by it alone would be taken for the other."""
        if name in self.model.adapters.names:
            raise ParameterError("lora_name", f"adapter {name!r} is loaded already: unload it first, or choose another")
        taken = fixed_names([other.model.config for other in self.others])
        taken.update(chain.from_iterable(other.model.adapters.names for other in self.others))
        if tagged(name) in set(map(tagged, taken)):
            raise ParameterError("lora_name", f"{name!r} is the name of a model or of another adapter")

    def _check_version(self, version: Model, param: str) -> None:
        """ParameterError for a version that no worker could serve, or that another model is: these are known by ids."""
        try:
            check_plan(self.model.config, version)
        except UsageError as error:
            raise ParameterError(param, str(error)) from error
        for other in self.others:
            if other is not self and other.versions.model_id == version.model_id:
                what = f"this would be the same model as {other.model.config.model_name!r}: use that one"
                raise ParameterError(param, what)


def fixed_names(configs: Iterable[ClusterConfig]) -> set[str]:
    """Of models and adapters in the cluster file."""
    named = ((own.model_name, *own.api.aliases, *(adapter.name for adapter in own.adapters)) for own in configs)
    return set(chain.from_iterable(named))


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
    header = read_adapter(path, base)
    check_adapter_weights([header])
    opened = _version(base, _serving(plain, base, adapters) | {number: (path, header)})
    return ServedAdapter(wanted.name, str(path), content=header.digest.hex()), opened


def _remaining(plain: Model, adapters: ServedAdapters) -> Model:
    """The model with the adapters that are left. ModelFileError where one of their files was changed."""
    if not adapters.loaded:
        return plain
    base = open_model(plain.file.path)
    return _version(base, _serving(plain, base, adapters))


def _version(base: ModelFile, adapters: Mapping[int, tuple[Path, Header]]) -> Model:
    numbered = [adapters.get(number, (None, None)) for number in range(max(adapters) + 1)]
    file = with_adapters(base, [header for _, header in numbered])
    return Model(file, adapter_paths=[path for path, _ in numbered])


def _serving(plain: Model, base: ModelFile, adapters: ServedAdapters) -> dict[int, tuple[Path, Header]]:
    """The adapters' files by their numbers. ModelFileError for files that are not the ones that do."""
    headers = {number: read_adapter(Path(adapter.path), base) for number, adapter in adapters.numbered}
    for number, adapter in adapters.loaded:
        if headers[number].digest.hex() != adapter.content:
            raise ModelFileError(f"{adapter.path}: another file than that of adapter {adapter.name!r}: put it back")
    if adapted_identity(base, [headers[number] for number in range(len(adapters.first))]) != plain.model_id:
        raise ModelFileError(f"{base.path}: it, or an adapter of the cluster file, was changed: start the cluster anew")
    return {number: (Path(adapter.path), headers[number]) for number, adapter in adapters.numbered}


def _allowed(folder: Path, given: str) -> Path:
    """Where an adapter is, links followed. ParameterError outside the folder, HttpError 404 where there is none."""
    shown = repr(given[:_MOST_SHOWN])
    try:
        root, path = folder.resolve(), (folder / given).resolve()
        files = (path, *(file.resolve() for file in adapter_files(path)))
        if path == root or not all(file.is_relative_to(root) for file in files):
            raise ParameterError("lora_path", f"{shown} is not in the folder of adapters (api.adapter_folder)")
        if not is_adapter(path):
            raise HttpError(404, "adapter_not_found", f"lora_path: no adapter is at {shown}", param="lora_path")
    except (OSError, ValueError, RuntimeError) as error:
        raise ParameterError("lora_path", f"{shown} is no path: {type(error).__name__}") from error
    return path

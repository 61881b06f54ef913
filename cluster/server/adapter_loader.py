"""Loads and unloads LoRA adapters for clients while a model is served, and records them for the next start."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from llamaclust.cluster.config.cluster_config import ClusterConfig
from llamaclust.cluster.config.values import tagged
from llamaclust.cluster.control.actions import ActionRunner
from llamaclust.cluster.control.limits import check_plan
from llamaclust.cluster.front.errors import HttpError
from llamaclust.cluster.state.adapters import AdapterRecord, ServedAdapter, ServedAdapters
from llamaclust.cluster.state.events import Notice, Report
from llamaclust.core.errors import LlamaclustError, ModelFileError, ParameterError, UsageError
from llamaclust.core.limits import MAX_ADAPTERS
from llamaclust.model.adapters import adapter_files, check_adapter_weights, is_adapter, read_adapter
from llamaclust.model.loader import Model

_MOST_SHOWN = 200
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class OpenedModel:
    """A model with its configuration and its LoRA adapters, from the cluster file and from clients."""

    config: ClusterConfig
    model: Model  # With the adapters of the cluster file.
    adapted: Model  # With the adapters of the cluster file and of clients.
    adapters: ServedAdapters

    @classmethod
    async def restore(
        cls, config: ClusterConfig, model: Model, record: AdapterRecord, *, names: set[str], report: Report
    ) -> OpenedModel:
        """Opens the recorded adapters. Skips an adapter whose file has changed or whose name is taken (in `names`)."""
        first = [ServedAdapter(adapter.name, str(adapter.path), adapter.scale) for adapter in config.adapters]
        adapters, adapted = ServedAdapters(first), model
        folder = config.api.adapter_folder
        for number, adapter in record.of(config.model_name) if folder is not None else ():
            assert folder is not None
            try:
                if adapter.name in names:
                    raise UsageError("a model or another adapter has this name now; rename one of them and restart")
                free = number if number not in adapters.numbers else _free_number(adapters)
                found, opened = await asyncio.to_thread(_opened, adapted, folder, free, adapter)
                if found.content != adapter.content:
                    raise ModelFileError(f"{adapter.path}: the file has changed since it was loaded")
            except LlamaclustError as error:
                report(Notice(f"adapter {adapter.name!r} could not be loaded again: {error}"))
                record.keep(config.model_name, number, adapter)
                continue
            names.add(adapter.name)
            adapters.add(free, found)
            adapted = opened
        return cls(config, model, adapted, adapters)


@dataclass(eq=False, slots=True)
class AdapterLoader:
    opened: OpenedModel
    _runner: ActionRunner
    _record: AdapterRecord
    _report: Report
    others: Sequence[AdapterLoader]  # Loaders of all models, including this one.
    _turn: asyncio.Lock
    model: Model = field(init=False)  # The model with the adapters that are loaded now.
    copies: list[str] = field(default_factory=list)  # Names that clients gave the model.

    def __post_init__(self) -> None:
        self.model = self.opened.adapted

    @property
    def name(self) -> str:
        return self.opened.config.model_name

    @property
    def adapters(self) -> ServedAdapters:
        return self.opened.adapters

    async def load(self, name: str, path: str) -> None:
        """Loads an adapter, so that requests can use it. Raises ParameterError if the name or path is not allowed,
        HttpError 404 if the file is missing, HttpError 503 if the model is asleep, and ModelFileError or
        InsufficientMemoryError if loading fails. If an error is raised, nothing has changed."""
        folder, adapters = self.opened.config.api.adapter_folder, self.adapters
        assert folder is not None
        async with self._turn:
            self._check_name(name)
            self._check_awake()
            number, wanted = _free_number(adapters), ServedAdapter(name, path)
            adapter, model = await asyncio.to_thread(_opened, self.model, folder, number, wanted)
            try:
                check_plan(self.opened.config, model)
            except UsageError as error:
                raise ParameterError("lora_path", str(error)) from error
            before = self.model
            await self._replace(model, [*adapters.loaded, (number, adapter)])
            try:
                self._check_name(name)  # A client may have given a model this name meanwhile.
            except ParameterError:
                await self._replace(before, adapters.loaded)
                raise
            adapters.add(number, adapter)
        self._report(Notice(f"a client loaded adapter {number} {name!r}: {adapter.path}"))

    async def unload(self, name: str) -> None:
        """Unloads an adapter; the next start does not load it. Raises HttpError 404 if it does not exist, HttpError 409
        if it is in use, ParameterError if the cluster file names it, and the errors of `load`."""
        adapters = self.adapters
        async with self._turn:
            if name not in adapters.names and await self._record.remove(self.name, name):
                self._report(Notice(f"a client unloaded adapter {name!r}, which the start could not load"))
                return
            number = self._unloadable(name)
            self._check_awake()
            adapter, rest = adapters[number], {**self.model.adapters}
            del rest[number]
            adapters.remove(number)  # Requests that arrive from now on get the status 404.
            try:
                await self._replace(await asyncio.to_thread(self.model.adapted_by, rest), adapters.loaded)
            except BaseException:
                adapters.add(number, adapter)
                raise
        self._report(Notice(f"a client unloaded adapter {number} {name!r}"))

    async def _replace(self, model: Model, loaded: Sequence[tuple[int, ServedAdapter]]) -> None:
        await self._runner.set_adapters(model)
        try:
            await self._record.write(self.name, loaded)
        except LlamaclustError:
            await self._runner.set_adapters(self.model)
            raise
        self.model = model

    def _unloadable(self, name: str) -> int:
        adapters = self.adapters
        number = adapters.number_of(name)
        if number is None:
            message = f"lora_name: model {self.name!r} has no adapter {name[:_MOST_SHOWN]!r}"
            raise HttpError(404, "adapter_not_found", message, param="lora_name")
        if not adapters[number].content:
            raise ParameterError("lora_name", f"{name!r} is an adapter of the cluster file: remove it there")
        if any(number == other for other, _ in adapters.default):
            what = f"adapter {name!r} is used by default in all requests: set its scale to 0 by POST /lora-adapters"
            raise HttpError(409, "adapter_in_use", what, param="lora_name")
        if uses := adapters.uses(number):
            requests = "1 request uses" if uses == 1 else f"{uses} requests use"
            what = f"{requests} adapter {name!r}: try again when no request uses it"
            raise HttpError(409, "adapter_in_use", what, param="lora_name")
        return number

    def _check_awake(self) -> None:
        if self._runner.is_asleep:
            what = f"model {self.name!r} is not loaded"
            raise HttpError(503, "model_not_loaded", f"{what}: load it by POST /models/load, then try again")

    def _check_name(self, name: str) -> None:
        if name in self.adapters.names:
            raise ParameterError("lora_name", f"adapter {name!r} is loaded already; unload it, or choose another name")
        taken = fixed_names([other.opened.config for other in self.others])
        taken.update(chain.from_iterable((*other.adapters.names, *other.copies) for other in self.others))
        if tagged(name) in set(map(tagged, taken)):
            raise ParameterError("lora_name", f"{name!r} is the name of a model or of another adapter")


def fixed_names(configs: Iterable[ClusterConfig]) -> set[str]:
    named = ((own.model_name, *own.api.aliases, *(adapter.name for adapter in own.adapters)) for own in configs)
    return set(chain.from_iterable(named))


def _free_number(adapters: ServedAdapters) -> int:
    free = next((number for number in range(MAX_ADAPTERS) if number not in adapters.numbers), None)
    if free is None:
        raise ParameterError("lora_name", f"{MAX_ADAPTERS} adapters are loaded, which is the limit: unload one first")
    return free


def _opened(model: Model, folder: Path, number: int, wanted: ServedAdapter) -> tuple[ServedAdapter, Model]:
    path = _allowed(folder, wanted.path)
    file = read_adapter(path, model.plain)
    check_adapter_weights([file])
    adapted = model.adapted_by({**model.adapters, number: file})
    return ServedAdapter(wanted.name, str(path), content=file.identity), adapted


def _allowed(folder: Path, given: str) -> Path:
    shown = repr(given[:_MOST_SHOWN])
    try:
        root, path = folder.resolve(), (folder / given).resolve()
        files = (path, *(file.resolve() for file in adapter_files(path)))
        if path == root or not all(file.is_relative_to(root) for file in files):
            raise ParameterError("lora_path", f"{shown} is not in the folder of adapters (api.adapter_folder)")
        if not is_adapter(path):
            raise HttpError(404, "adapter_not_found", f"lora_path: no adapter is at {shown}", param="lora_path")
    except (OSError, ValueError, RuntimeError) as error:
        raise ParameterError("lora_path", f"{shown} is not a path: {type(error).__name__}") from error
    return path

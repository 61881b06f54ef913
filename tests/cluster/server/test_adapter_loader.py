"""Tests of loads and unloads of adapters, on fake stages: what stays as it was, and turns of several models."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from shutil import copyfile
from types import SimpleNamespace
from typing import Any, cast

import pytest

from llamaclust.cluster.config.cluster_config import ClusterConfig
from llamaclust.cluster.front.errors import HttpError
from llamaclust.cluster.front.settings import ApiSettings, ModelNames
from llamaclust.cluster.server import adapter_loader, front
from llamaclust.cluster.server.adapter_loader import AdapterLoader, OpenedModel
from llamaclust.cluster.state.adapters import AdapterRecord, ServedAdapter, ServedAdapters
from llamaclust.core.errors import LlamaclustError, ParameterError, UsageError
from llamaclust.model.loader import Model
from support.models.tiny_adapter import build_adapter
from support.models.tiny_model import build_tiny_model


@dataclass
class Runner:
    """A fake runner of a model that never sleeps."""

    digests: dict[int, str] = field(default_factory=dict)
    is_asleep: bool = False

    async def set_adapters(self, model: Model) -> None:
        await asyncio.sleep(0)
        self.digests = model.adapter_digests


@dataclass
class Loaders:
    """The adapter loaders of several models that share a record."""

    folder: Path
    record: AdapterRecord
    all: list[AdapterLoader]

    def names(self) -> list[list[str]]:
        """Returns the adapter names of each model, as the next coordinator reads them."""
        again = AdapterRecord(self.record.path)
        return [[adapter.name for _, adapter in again.of(loader.name)] for loader in self.all]


def stages(loader: AdapterLoader) -> Runner:
    runner: Any = loader._runner
    return cast(Runner, runner)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Makes two models, and adapters that fit both."""
    folder = tmp_path_factory.mktemp("files")
    for seed, name in enumerate(("one", "two")):
        build_tiny_model(folder / f"{name}.gguf", seed=seed)
    for seed, name in enumerate(("first", "poet", "clerk")):
        build_adapter(folder / f"{name}.gguf", folder / "one.gguf", rank=2, seed=seed)
    return folder


@pytest.fixture
def loaders(files: Path, tmp_path: Path) -> Iterator[Loaders]:
    """Yields loaders on copies of the files; both models have an adapter in the cluster file."""
    (tmp_path / "further").mkdir()
    for name in ("one", "two", "first"):
        copyfile(files / f"{name}.gguf", tmp_path / f"{name}.gguf")
    for name in ("poet", "clerk"):
        copyfile(files / f"{name}.gguf", tmp_path / "further" / f"{name}.gguf")
    record, turn = AdapterRecord(tmp_path / "adapters.json"), asyncio.Lock()
    found = Loaders(tmp_path, record, [])
    for name in ("one", "two"):
        config = ClusterConfig.model_validate(
            {
                "model": str(tmp_path / f"{name}.gguf"),
                "workers": [{"name": "a"}],
                "api": {"adapter_folder": str(tmp_path / "further")},
            }
        )
        model = Model.open(tmp_path / f"{name}.gguf", adapters=[tmp_path / "first.gguf"])
        served = ServedAdapters([ServedAdapter(f"first of {name}", str(tmp_path / "first.gguf"))])
        runner: Any = Runner(model.adapter_digests)
        opened = OpenedModel(config, model, model, served)
        found.all.append(AdapterLoader(opened, runner, record, lambda event: None, found.all, turn))
    yield found
    for loader in found.all:
        loader.opened.model.close()


async def test_models_that_load_at_the_same_time_keep_both_records(loaders: Loaders) -> None:
    one, two = loaders.all
    await asyncio.gather(one.load("poet", "poet.gguf"), two.load("clerk", "clerk.gguf"))
    assert loaders.names() == [["poet"], ["clerk"]]


@pytest.mark.parametrize("name", ["one:latest", "two:latest", "first of two:latest", "first of one:latest", "one"])
async def test_a_tag_makes_no_other_name(loaders: Loaders, name: str) -> None:
    """Ollama's clients write MODEL:latest for MODEL, so that the adapter would answer in the model's place."""
    with pytest.raises(ParameterError, match="is the name of a model or of another adapter"):
        await loaders.all[0].load(name, "poet.gguf")
    assert loaders.names() == [[], []]


def _copy(loader: AdapterLoader, name: str) -> None:
    """Gives the loader's model another name, as a client of Ollama does."""
    served: Any = SimpleNamespace(
        config=loader.opened.config, model=loader.model, adapters=loader.adapters, loader=loader
    )
    ModelNames(loader.name, front._settings_of(served, ApiSettings(), ())).copy(loader.name, name)


@pytest.mark.parametrize("name", ["poet", "poet:latest"])
@pytest.mark.parametrize("copied", [0, 1])
async def test_an_adapter_does_not_take_the_name_of_a_copy_of_any_model(
    loaders: Loaders, name: str, copied: int
) -> None:
    _copy(loaders.all[copied], "poet")
    with pytest.raises(ParameterError, match="is the name of a model or of another adapter"):
        await loaders.all[0].load(name, "poet.gguf")
    assert loaders.names() == [[], []]


async def test_a_copy_that_takes_the_name_during_the_load_keeps_it(
    loaders: Loaders, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = loaders.all
    before, set_adapters = stages(one).digests, Runner.set_adapters

    async def copied(runner: Runner, model: Model) -> None:
        await set_adapters(runner, model)
        _copy(two, "poet")

    monkeypatch.setattr(Runner, "set_adapters", copied)
    with pytest.raises(ParameterError, match="is the name of a model or of another adapter"):
        await one.load("poet", "poet.gguf")
    assert stages(one).digests == before == one.model.adapter_digests
    assert loaders.names() == [[], []] and one.adapters.names == ("first of one",)


async def test_of_models_that_take_a_name_at_the_same_time_one_gets_it(loaders: Loaders) -> None:
    loads = (loader.load("poet", "poet.gguf") for loader in loaders.all)
    errors = await asyncio.gather(*loads, return_exceptions=True)
    assert [type(error) for error in errors] == [type(None), ParameterError] and loaders.names() == [["poet"], []]


@pytest.mark.parametrize(("changed", "other"), [("further/poet", "further/clerk"), ("first", "further/clerk")])
async def test_a_load_does_not_depend_on_files_of_loaded_adapters(loaders: Loaders, changed: str, other: str) -> None:
    """Stages hold the loaded adapters; only later epochs read a replaced file."""
    loader = loaders.all[0]
    await loader.load("poet", "poet.gguf")
    before = stages(loader).digests
    replacement = loaders.folder / "replacement"
    copyfile(loaders.folder / f"{other}.gguf", replacement)
    replacement.rename(loaders.folder / f"{changed}.gguf")
    await loader.load("clerk", "clerk.gguf")
    assert stages(loader).digests == before | {2: loader.adapters[2].content}
    await loader.unload("clerk")
    assert stages(loader).digests == before and loaders.names() == [["poet"], []]


async def test_a_record_that_cannot_be_written_changes_nothing(
    loaders: Loaders, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_: object) -> None:
        raise LlamaclustError("the disk is full")

    loader = loaders.all[0]
    await loader.load("poet", "poet.gguf")
    before = stages(loader).digests
    monkeypatch.setattr(AdapterRecord, "write", fail)
    for change in (loader.load("clerk", "clerk.gguf"), loader.unload("poet")):
        with pytest.raises(LlamaclustError, match="the disk is full"):
            await change
        assert stages(loader).digests == before and loader.adapters.names == ("first of one", "poet")


async def test_what_no_plan_can_have_is_refused_at_once(loaders: Loaders, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan of the cluster file may exclude adapters, so that a load of one could never end."""

    def refuse(config: ClusterConfig, model: Model) -> None:
        if len(model.adapters) > 1:
            raise UsageError("plan: the group of a, b: two adapters are too many")

    monkeypatch.setattr(adapter_loader, "check_plan", refuse)
    loader = loaders.all[0]
    before = stages(loader).digests
    with pytest.raises(ParameterError, match=r"lora_path: plan: the group of a, b: two adapters are too many"):
        await loader.load("poet", "poet.gguf")
    assert stages(loader).digests == before and loader.adapters.names == ("first of one",)
    assert loaders.names() == [[], []]


async def test_an_adapter_that_was_not_loaded_again_is_unloaded_by_its_name(loaders: Loaders) -> None:
    loader = loaders.all[0]
    await loaders.record.write("one", [(1, ServedAdapter("absent", "/absent.gguf", content="ab"))])
    loaders.record.keep("one", 1, ServedAdapter("absent", "/absent.gguf", content="ab"))
    await loader.load("poet", "poet.gguf")
    assert loaders.names() == [["poet", "absent"], []]
    await loader.unload("absent")
    assert loaders.names() == [["poet"], []]
    with pytest.raises(HttpError, match="no adapter 'absent'"):
        await loader.unload("absent")

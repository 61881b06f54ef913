"""Loads and unloads of adapters, on versions that serve at once: what stays as it was, and several models' turns."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from shutil import copyfile
from typing import Any

import pytest

from llamaclust.cluster.config.cluster_config import ClusterConfig
from llamaclust.cluster.front.errors import HttpError
from llamaclust.cluster.server import adapter_loader
from llamaclust.cluster.server.adapter_loader import AdapterLoader, OpenedModel
from llamaclust.cluster.state.adapters import AdapterRecord, ServedAdapter, ServedAdapters
from llamaclust.core.errors import ModelFileError, ParameterError, UsageError
from llamaclust.model.loader import Model
from support.models.tiny_adapter import build_adapter
from support.models.tiny_model import build_tiny_model


@dataclass
class Versions:
    """Of a model that never sleeps."""

    wanted: Model
    is_asleep: bool = False

    @property
    def model_id(self) -> str:
        return self.wanted.model_id

    async def replace(self, model: Model) -> None:
        await asyncio.sleep(0)
        self.wanted = model


@dataclass
class Loaders:
    """Of models with one record."""

    folder: Path
    record: AdapterRecord
    all: list[AdapterLoader]

    def names(self) -> list[list[str]]:
        """Of each model, as the next coordinator reads them."""
        again = AdapterRecord(self.record.path)
        return [[adapter.name for _, adapter in again.of(loader.model.config.model_name)] for loader in self.all]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, and adapters that fit both."""
    folder = tmp_path_factory.mktemp("files")
    for seed, name in enumerate(("one", "two")):
        build_tiny_model(folder / f"{name}.gguf", seed=seed)
    for seed, name in enumerate(("first", "poet", "clerk")):
        build_adapter(folder / f"{name}.gguf", folder / "one.gguf", rank=2, seed=seed)
    return folder


@pytest.fixture
def loaders(files: Path, tmp_path: Path) -> Iterator[Loaders]:
    """On copies of the files; both models have an adapter in the cluster file."""
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
        plain = Model.open(tmp_path / f"{name}.gguf", adapters=[tmp_path / "first.gguf"])
        served = ServedAdapters([ServedAdapter(f"first of {name}", str(tmp_path / "first.gguf"))])
        versions: Any = Versions(plain)
        opened = OpenedModel(config, plain, plain, served)
        found.all.append(AdapterLoader(opened, versions, record, lambda event: None, found.all, turn))
    yield found
    for loader in found.all:
        loader.model.plain.close()


async def test_models_that_load_at_the_same_time_keep_both_records(loaders: Loaders) -> None:
    one, two = loaders.all
    await asyncio.gather(one.load("poet", "poet.gguf"), two.load("clerk", "clerk.gguf"))
    assert loaders.names() == [["poet"], ["clerk"]]


@pytest.mark.parametrize("name", ["one:latest", "two:latest", "first of two:latest", "first of one:latest", "one"])
async def test_a_tag_makes_no_other_name(loaders: Loaders, name: str) -> None:
    """Ollama's clients write MODEL:latest for MODEL: the adapter would answer in its place."""
    with pytest.raises(ParameterError, match="is the name of a model or of another adapter"):
        await loaders.all[0].load(name, "poet.gguf")
    assert loaders.names() == [[], []]


async def test_of_models_that_take_a_name_at_the_same_time_one_gets_it(loaders: Loaders) -> None:
    loads = (loader.load("poet", "poet.gguf") for loader in loaders.all)
    errors = await asyncio.gather(*loads, return_exceptions=True)
    assert [type(error) for error in errors] == [type(None), ParameterError] and loaders.names() == [["poet"], []]


@pytest.mark.parametrize(
    ("changed", "other", "why"),
    [
        ("further/poet", "further/clerk", "another file than that of adapter 'poet'"),
        ("first", "further/clerk", "or an adapter of the cluster file, was changed"),
        ("one", "two", "or an adapter of the cluster file, was changed"),
    ],
)
async def test_a_load_does_not_change_what_is_served(loaders: Loaders, changed: str, other: str, why: str) -> None:
    """Where a file that is served was replaced since it was loaded."""
    loader = loaders.all[0]
    await loader.load("poet", "poet.gguf")
    served = loader.versions.model_id
    replacement = loaders.folder / "replacement"
    copyfile(loaders.folder / f"{other}.gguf", replacement)
    replacement.rename(loaders.folder / f"{changed}.gguf")
    with pytest.raises(ModelFileError, match=why):
        await loader.load("clerk", "clerk.gguf")
    assert loader.versions.model_id == served and loader.model.adapters.names == ("first of one", "poet")
    assert loaders.names() == [["poet"], []]


async def test_what_no_plan_can_have_is_refused_at_once(loaders: Loaders, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the cluster file's plan has no place for adapters: a plan would never come."""

    def refuse(config: ClusterConfig, model: Model) -> None:
        if len(model.adapter_numbers) > 1:
            raise UsageError("plan: the group of a, b: two adapters are too many")

    monkeypatch.setattr(adapter_loader, "check_plan", refuse)
    loader = loaders.all[0]
    served = loader.versions.model_id
    with pytest.raises(ParameterError, match=r"lora_path: plan: the group of a, b: two adapters are too many"):
        await loader.load("poet", "poet.gguf")
    assert loader.versions.model_id == served and loader.model.adapters.names == ("first of one",)
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

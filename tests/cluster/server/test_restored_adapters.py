"""Tests of recorded adapters at a start: some are loaded again, and the record keeps the others."""

from __future__ import annotations

from pathlib import Path

import pytest

from llamaclust.cluster.config.cluster_config import ClusterConfig
from llamaclust.cluster.server.adapter_loader import OpenedModel, fixed_names
from llamaclust.cluster.state.adapters import AdapterRecord, ServedAdapter
from llamaclust.cluster.state.events import Event, Notice
from llamaclust.model.adapters import read_adapter
from llamaclust.model.gguf.model_file import open_model
from llamaclust.model.loader import Model
from support.models.tiny_adapter import build_adapter
from support.models.tiny_model import build_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Makes a model with two adapters beside it."""
    folder = tmp_path_factory.mktemp("model")
    path = build_tiny_model(folder / "tiny.gguf")
    (folder / "further").mkdir()
    for seed, name in enumerate(("poet", "clerk")):
        build_adapter(folder / "further" / f"{name}.gguf", path, rank=2, seed=seed)
    return path


def config_of(model: Path, **values: object) -> ClusterConfig:
    api = {"adapter_folder": str(model.parent / "further"), **values}
    return ClusterConfig.model_validate({"model": str(model), "workers": [{"name": "a"}], "api": api})


async def recorded(model: Path, folder: Path, *names: str) -> AdapterRecord:
    """Writes the record of a former coordinator."""
    base, record = open_model(model), AdapterRecord(folder / "adapters.json")
    paths = [model.parent / "further" / f"{name}.gguf" for name in names]
    digests = [read_adapter(path, base).identity for path in paths]
    entries = [
        ServedAdapter(name, str(path), content=digest) for name, path, digest in zip(names, paths, digests, strict=True)
    ]
    await record.write("tiny", [*enumerate(entries)])
    return AdapterRecord(record.path)


async def restored(config: ClusterConfig, model: Path, record: AdapterRecord) -> tuple[OpenedModel, list[str]]:
    told: list[Event] = []
    names = fixed_names([config])
    with Model.open(model) as plain:
        opened = await OpenedModel.restore(config, plain, record, names=names, report=told.append)
    return opened, [event.text for event in told if isinstance(event, Notice)]


async def test_an_adapter_that_is_absent_for_a_while_stays_in_the_record(model: Path, tmp_path: Path) -> None:
    record = await recorded(model, tmp_path, "poet", "clerk")
    poet = model.parent / "further" / "poet.gguf"
    away = poet.rename(tmp_path / "poet.gguf")
    opened, told = await restored(config_of(model), model, record)
    away.rename(poet)
    assert opened.adapters.names == ("clerk",) and "'poet' could not be loaded again" in told[0]
    clerk = opened.adapters.loaded
    await record.write("tiny", [*clerk, (2, ServedAdapter("third", "/third.gguf", content="cc"))])
    opened, told = await restored(config_of(model), model, AdapterRecord(record.path))
    assert opened.adapters.names == ("poet", "clerk") and len(told) == 1


async def test_a_name_of_the_cluster_file_is_not_taken_again(model: Path, tmp_path: Path) -> None:
    record = await recorded(model, tmp_path, "poet", "clerk")
    opened, told = await restored(config_of(model, aliases=["poet"]), model, record)
    assert opened.adapters.names == ("clerk",)
    assert len(told) == 1 and "'poet' could not be loaded again: a model or another adapter has this name" in told[0]
    opened, told = await restored(config_of(model), model, AdapterRecord(record.path))
    assert opened.adapters.names == ("poet", "clerk") and not told

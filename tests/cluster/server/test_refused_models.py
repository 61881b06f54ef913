"""Tests of clusters of several models whose files are refused."""

from __future__ import annotations

from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from llamaclust.cluster.config.cluster_config import ClusterConfig
from llamaclust.cluster.launchers.local import LocalLauncher
from llamaclust.cluster.launchers.run_directory import run_directory
from llamaclust.cluster.server.start import open_models
from llamaclust.cluster.state.events import Event, Notice
from llamaclust.core.errors import ModelFileError
from llamaclust.model.gguf.writer import write_gguf
from support.models.tiny_model import build_tiny_model


def _cut(path: Path) -> None:
    build_tiny_model(path)
    path.write_bytes(path.read_bytes()[:-1000])


def _unknown(path: Path) -> None:
    write_gguf(path, {"general.architecture": "unheard_of"}, [])


def _text(path: Path) -> None:
    path.write_text("this is not a model")


DAMAGED = {"cut": _cut, "unknown": _unknown, "text": _text}


def config_of(folder: Path, names: list[str], **entry: Any) -> tuple[ClusterConfig, list[Path]]:
    paths = [folder / f"{name}.gguf" for name in names]
    for seed, path in enumerate(paths):
        damaged = DAMAGED.get(path.stem)
        damaged(path) if damaged is not None else build_tiny_model(path, seed=seed)
    values = {"models": [{"model": str(path), **entry} for path in paths], "workers": [{"name": "a"}]}
    return ClusterConfig.model_validate(values), paths


async def opened(config: ClusterConfig, paths: list[Path], folder: Path) -> tuple[list[str], list[str], list[str]]:
    """Returns the names of the remaining models' configurations, of the opened models, and the notices."""
    events: list[Event] = []
    async with AsyncExitStack() as stack:
        launcher = LocalLauncher(stack.enter_context(run_directory(folder / "run")), folder / "logs")
        kept, models = await open_models(stack, config, paths, launcher, events.append)
        notices = [event.text for event in events if isinstance(event, Notice)]
        return [own.model_name for own in kept.of_each_model()], [own.model_name for own, _ in models], notices


@pytest.mark.parametrize(
    "names", [["a", "cut", "b"], ["unknown", "a"], ["text", "a", "cut", "b", "unknown"], ["b", "text"]]
)
async def test_the_other_models_are_served(tmp_path: Path, names: list[str]) -> None:
    kept, models, notices = await opened(*config_of(tmp_path, names), tmp_path)
    assert kept == models == [name for name in names if name not in DAMAGED]
    refused = [name for name in names if name in DAMAGED]
    assert len(notices) == len(refused)
    assert all(notice.startswith(f"{name} is not served: ") for name, notice in zip(refused, notices, strict=True))


async def test_a_projector_that_is_refused_stops_only_its_model(tmp_path: Path) -> None:
    config, paths = config_of(tmp_path, ["a", "b"])
    wrong = tmp_path / "wrong.gguf"
    _unknown(wrong)
    entries = [config.models[0], config.models[1].model_copy(update={"mmproj": str(wrong)})]
    kept, _, notices = await opened(config.model_copy(update={"models": tuple(entries)}), paths, tmp_path)
    assert kept == ["a"] and "b is not served" in notices[0]


async def test_a_cluster_without_any_model_names_each_refusal(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError) as error:
        await opened(*config_of(tmp_path, ["cut", "text"]), tmp_path)
    assert "cut is not served" in str(error.value) and "text is not served" in str(error.value)

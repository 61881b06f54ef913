"""Tests of clusters of several models whose files are refused."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llamaclust.cluster.config.cluster_config import ClusterConfig
from llamaclust.cluster.launchers.local import LocalLauncher
from llamaclust.cluster.launchers.run_directory import run_directory
from llamaclust.cluster.server.start import open_models
from llamaclust.cluster.state.events import Event, Notice
from llamaclust.cluster.state.journal_records import Instant, has_unanswered, read_journal
from llamaclust.core.errors import ModelFileError
from llamaclust.model.gguf.writer import write_gguf
from support.clusters.journals import admission, journal
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


async def opened(
    config: ClusterConfig, paths: list[Path], folder: Path, *, needs_all: bool = False
) -> tuple[list[str], list[str], list[str]]:
    """Returns the names of the remaining models' configurations, of the opened models, and the notices."""
    events: list[Event] = []
    async with AsyncExitStack() as stack:
        launcher = LocalLauncher(stack.enter_context(run_directory(folder / "run")), folder / "logs")
        kept, models = await open_models(stack, config, paths, launcher, events.append, needs_all=needs_all)
        notices = [event.text for event in events if isinstance(event, Notice)]
        return [own.model_name for own in kept.of_each_model()], [own.model_name for own, _ in models], notices


@pytest.mark.parametrize(
    "names", [["a", "cut", "b"], ["a", "unknown"], ["a", "text", "cut", "b", "unknown"], ["b", "text"]]
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


@pytest.mark.parametrize("damage", DAMAGED)
async def test_the_model_of_requests_that_name_none_must_open(tmp_path: Path, damage: str) -> None:
    with pytest.raises(ModelFileError, match=damage):
        await opened(*config_of(tmp_path, [damage, "a"]), tmp_path)


@pytest.mark.parametrize("damage", DAMAGED)
async def test_all_models_must_open_while_accepted_requests_are_unanswered(tmp_path: Path, damage: str) -> None:
    with pytest.raises(ModelFileError, match=damage):
        await opened(*config_of(tmp_path, ["a", damage]), tmp_path, needs_all=True)


async def test_the_journal_tells_whether_requests_are_unanswered(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    assert not has_unanswered(path)
    path.write_bytes(b"of another version\n")
    assert not has_unanswered(path)
    path.unlink()
    async with journal(path) as writing:
        requests = [replace(admission(number), admitted=Instant.now(), limit_s=600.0) for number in range(3)]
        await asyncio.gather(*map(writing.admit, requests))
    assert has_unanswered(path)
    for number, is_left in enumerate((True, True, False)):
        async with journal(path) as writing:
            await writing.restore(read_journal(path, Instant.now()))
            writing.end(f"id{number}")
        assert has_unanswered(path) == is_left

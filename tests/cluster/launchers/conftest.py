"""Fixtures for tests of launchers."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from support.clusters.forking.forked_workers import ForkedWorkers
from support.clusters.launched import Answers, model_in, of_one_worker


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_in(tmp_path_factory)


@pytest.fixture(scope="module")
def undisturbed(model: Path) -> Answers:
    return of_one_worker(model)


@pytest.fixture(autouse=True)
def _workers_start_as_users_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    if isinstance(spawn := asyncio.create_subprocess_exec, ForkedWorkers):
        monkeypatch.setattr(asyncio, "create_subprocess_exec", spawn.spawn)

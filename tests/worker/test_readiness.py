"""Tests of readiness: a worker is ready if it is idle, or holds layers and loads none."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest

from llamaclust.worker import readiness
from llamaclust.worker.readiness import Readiness
from llamaclust.worker.service import StageService
from llamaclust.worker.stage.streams import StageStreams


async def eventually(check: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not check():  # noqa: ASYNC110  a file reports nothing
            await asyncio.sleep(0.01)


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(readiness, "_PERIOD_S", 0.01)
    return tmp_path / "ready"


class LoadedStage:
    epoch = 1

    def close_links(self) -> None: ...


def test_layers_make_it_ready_and_a_load_does_not(file: Path) -> None:
    is_ready = file.exists

    async def run() -> None:
        exclusive, service = asyncio.Lock(), StageService("a")
        following = asyncio.create_task(Readiness(file).follow(exclusive, service))
        await asyncio.sleep(0.1)
        assert not is_ready(), "its port is open, but it has no layers"
        async with exclusive:
            service.add(cast(StageStreams, LoadedStage()))
            await asyncio.sleep(0.1)
            assert not is_ready(), "the load is under way"
        await eventually(is_ready)
        async with exclusive:
            await eventually(lambda: not is_ready())
        await eventually(is_ready)
        service.keep()  # the coordinator is disconnected
        await eventually(lambda: not is_ready())
        following.cancel()

    asyncio.run(run())


def test_an_idle_worker_is_ready_until_its_membership_ends(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readiness, "IDLE_S", 0.2)

    is_ready = file.exists

    async def run() -> None:
        following = asyncio.create_task(Readiness(file).follow(asyncio.Lock(), StageService("a")))
        await eventually(is_ready)
        following.cancel()
        await asyncio.wait([following])
        assert not is_ready()

    asyncio.run(run())


def test_a_killed_process_leaves_no_readiness(file: Path) -> None:
    file.touch()
    Readiness(file)
    assert not file.exists()


def test_a_disk_that_is_full_for_a_while_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(readiness, "_PERIOD_S", 0.01)
    monkeypatch.setattr(readiness, "IDLE_S", 0.0)
    file = tmp_path / "folder" / "ready"

    async def run() -> None:
        following = asyncio.create_task(Readiness(file).follow(asyncio.Lock(), StageService("a")))
        await eventually(lambda: "readiness cannot be shown: No such file" in caplog.text)
        file.parent.mkdir()
        await eventually(file.exists)
        following.cancel()

    asyncio.run(run())
    assert caplog.text.count("cannot be shown") == 1

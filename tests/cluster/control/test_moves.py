"""Tests of layers that move under load: both epochs serve side by side; answers are those of an undisturbed run."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from llamaclust.cluster.scheduler.requests import GenerationRequest
from support.clusters.recovering import (
    Answer,
    Recovering,
    answer_of,
    config,
    recovering,
)

TOKENS = 150


async def test_layers_are_moved_away_and_back_without_losing_a_token(
    model: Path, requests: tuple[GenerationRequest, ...], expected: list[Answer], tmp_path: Path
) -> None:
    async with recovering(config(model, tmp_path)) as run:
        supervisor = run.cluster.supervisor
        tasks = run.start(requests)
        await run.token(100)
        await run.cluster.pool.operations.drain("b")
        assert not run.worker("b").stages and run.worker("b").loss is None
        run.cluster.pool.operations.undrain("b")
        await run.whole()
        assert supervisor.recoveries == 0
        assert await asyncio.gather(*tasks) == expected
        await run.cluster.pool.operations.drain("b")
        run.hurt("a")
        await run.until("a again", lambda: supervisor.epoch.holds("a") and supervisor.epoch.root_cause is None)
        assert not supervisor.epoch.holds("b")
        run.cluster.pool.operations.undrain("b")
        await run.whole()
        assert await answer_of(run.cluster.engine.submit(requests[0])) == expected[0]


async def test_a_worker_that_returns_gets_layers_under_load(
    model: Path, requests: tuple[GenerationRequest, ...], expected: list[Answer], tmp_path: Path
) -> None:
    async with recovering(config(model, tmp_path)) as run:
        tasks = run.start(requests)
        await run.token(40)
        run.hurt("c")
        await run.until("a recovery", lambda: run.cluster.supervisor.recoveries == 1)
        await run.whole()
        assert run.cluster.supervisor.recoveries == 1
        assert await asyncio.gather(*tasks) == expected


async def retiring(run: Recovering, name: str) -> asyncio.Task[None]:
    """Drains a worker; returns when requests run on the old and the new epoch."""
    drain = asyncio.create_task(run.cluster.pool.operations.drain(name))
    await run.both_epochs()
    return drain


@pytest.mark.usefixtures("staying")
async def test_a_drain_ends_when_the_old_epoch_has_no_request_and_new_ones_run_meanwhile(
    model: Path, requests: tuple[GenerationRequest, ...], expected: list[Answer], tmp_path: Path
) -> None:
    async with recovering(config(model, tmp_path)) as run:
        tasks = run.start(requests[:4])
        await run.token(40)
        drain = await retiring(run, "b")
        later = run.start(requests[4:])
        assert await asyncio.gather(*later) == expected[4:]
        assert await asyncio.gather(*tasks) == expected[:4]
        await drain
        assert not run.worker("b").stages and run.cluster.supervisor.recoveries == 0


def drained(run: Recovering) -> str:
    return "b"


def of_both(run: Recovering) -> str:
    return run.cluster.supervisor.epoch.workers[0].name


@pytest.mark.usefixtures("staying")
@pytest.mark.parametrize("victim", [drained, of_both])
async def test_a_worker_is_lost_while_an_epoch_retires(
    victim: Callable[[Recovering], str],
    model: Path,
    requests: tuple[GenerationRequest, ...],
    expected: list[Answer],
    tmp_path: Path,
) -> None:
    async with recovering(config(model, tmp_path)) as run:
        tasks = run.start(requests[:4])
        await run.token(40)
        drain = await retiring(run, "b")
        tasks += run.start(requests[4:])
        run.hurt(victim(run))
        assert await asyncio.gather(*tasks) == expected
        await drain
        is_lost = victim is of_both
        assert run.cluster.supervisor.recoveries == is_lost
        assert is_lost or any("requests of the previous epoch are computed again" in text for text in run.told)

"""Tests of layers that move between stages and groups under load: answers are those of one undisturbed worker."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import pytest

from llamaclust.cluster.scheduler.requests import GenerationRequest
from support.clusters.recovering import Answer, answer_of, recovering
from support.plans.automatic_groups import FAR_S, NAMES, NEAR_S, automatic, grouped, measured

TOKENS = 150


@pytest.mark.promise
@pytest.mark.parametrize("stays", [True, False], ids=["requests stay", "requests move"])
async def test_plans_change_between_stages_and_groups(
    stays: bool,
    model: Path,
    requests: tuple[GenerationRequest, ...],
    expected: list[Answer],
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    """Plans change twice as the network gets faster, and twice as it gets slower again."""
    if stays:
        request.getfixturevalue("staying")
    async with recovering(automatic(model, tmp_path)) as run:
        supervisor = run.cluster.supervisor
        for one_way_s in (NEAR_S, FAR_S) * 2:
            assert bool(run.groups) == (one_way_s == FAR_S)
            tasks = run.start(requests[:4])
            await run.token(run.tokens + 40)
            measured(run, one_way_s)
            await run.both_epochs()
            assert bool(run.groups) == (one_way_s == NEAR_S)
            assert await asyncio.gather(*run.start(requests[4:])) == expected[4:]
            assert await asyncio.gather(*tasks) == expected[:4]
            await run.until("the end of the old epoch", lambda: supervisor.retiring_epoch is None)
        assert supervisor.recoveries == 0, run.told


@pytest.mark.parametrize("name", ["a", "c"])
async def test_members_are_drained_and_come_back(
    name: str, model: Path, requests: tuple[GenerationRequest, ...], expected: list[Answer], tmp_path: Path
) -> None:
    async with recovering(automatic(model, tmp_path)) as run:
        measured(run, NEAR_S)
        await grouped(run)
        tasks = run.start(requests)
        await run.token(60)
        await run.cluster.pool.operations.drain(name)
        assert not run.worker(name).stages and run.worker(name).loss is None
        run.cluster.pool.operations.undrain(name)
        await grouped(run)
        assert await asyncio.gather(*tasks) == expected
        assert run.cluster.supervisor.recoveries == 0, run.told


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=lambda number: number.name)
async def test_another_plan_takes_a_lost_members_place_until_it_is_back(
    number: signal.Signals,
    model: Path,
    requests: tuple[GenerationRequest, ...],
    expected: list[Answer],
    tmp_path: Path,
) -> None:
    """Requests do not wait for the lost member: the other workers first form another group, or stages."""
    async with recovering(automatic(model, tmp_path)) as run:
        measured(run, NEAR_S)
        await grouped(run)
        for victim in "cb":
            tasks, before, recoveries = run.start(requests), run.tokens, run.cluster.supervisor.recoveries
            await run.token(before + 60)
            run.hurt(victim, number)
            await run.until("a recovery", lambda before=recoveries: run.cluster.supervisor.recoveries > before)  # type: ignore[misc]
            assert await asyncio.gather(*tasks) == expected
            await grouped(run)
        assert await answer_of(run.cluster.engine.submit(requests[0])) == expected[0]


@pytest.mark.usefixtures("staying")
@pytest.mark.parametrize("victim", NAMES)
async def test_a_worker_is_lost_while_stages_and_a_group_serve_side_by_side(
    victim: str, model: Path, requests: tuple[GenerationRequest, ...], expected: list[Answer], tmp_path: Path
) -> None:
    async with recovering(automatic(model, tmp_path)) as run:
        tasks = run.start(requests[:4])
        await run.token(40)
        measured(run, NEAR_S)
        await run.both_epochs()
        tasks += run.start(requests[4:])
        run.hurt(victim)
        assert await asyncio.gather(*tasks) == expected
        await grouped(run)

"""Tests of workers that are killed or hang while requests run: a pause, then the tokens of an undisturbed run."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from random import Random
from typing import Any

import pytest

from llamaclust.cluster.control.resources import profiling
from llamaclust.cluster.membership.worker_handle import WorkerHandle
from llamaclust.cluster.membership.worker_requests import profile_worker
from llamaclust.cluster.scheduler.requests import GenerationRequest
from llamaclust.core.profile import Profile
from llamaclust.wire.control.profiles import ProfileWorker
from support.clusters.faults.worker_program import run_in_workers
from support.clusters.recovering import (
    Answer,
    config,
    recovering,
    worker_pids,
)
from support.seed import SEED

TOKENS = 100
VICTIMS = 2  # of three workers


async def test_a_worker_that_is_killed_while_the_start_measures_is_planned_around(
    model: Path,
    requests: tuple[GenerationRequest, ...],
    expected: list[Answer],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def profiled(worker: WorkerHandle, request: ProfileWorker, *more: Any) -> Profile:
        if worker.name == "c" and worker.loss is None:
            os.kill(worker.registration.pid, signal.SIGKILL)
        return await profile_worker(worker, request, *more)

    monkeypatch.setattr(profiling, "profile_worker", profiled)
    unmeasured = [{"name": name, "threads": 1} for name in "abc"]
    async with recovering(config(model, tmp_path, workers=unmeasured)) as run:
        assert any("the start continues without worker c" in text for text in run.told)
        assert await asyncio.gather(*run.start(requests)) == expected
        await run.until("worker c again", lambda: "c" in run.cluster.registry.present)


@pytest.mark.promise
@pytest.mark.parametrize("moment", ["prefill", "decode"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=lambda number: number.name)
async def test_any_worker_is_lost_at_any_moment(
    number: signal.Signals,
    moment: str,
    model: Path,
    requests: tuple[GenerationRequest, ...],
    expected: list[Answer],
    tmp_path: Path,
) -> None:
    source = Random(SEED)
    async with recovering(config(model, tmp_path)) as run:
        for victim in source.sample("abc", VICTIMS):
            tasks, before = run.start(requests), run.tokens
            at = 0 if moment == "prefill" else source.randrange(1, len(requests) * TOKENS * 3 // 4)
            print(f"{victim} at token {at}")
            await run.token(before + at) if at else await run.at_work()
            run.hurt(victim, number)
            assert await asyncio.gather(*tasks) == expected
            await run.until("the loss", lambda victim=victim: f"worker {victim} " in " ".join(run.told))  # type: ignore[misc]
            await run.whole()
        assert run.cluster.supervisor.recoveries >= VICTIMS - (number is signal.SIGSTOP)


@pytest.mark.parametrize("victims", [("a", "c"), ("b", "a", "c")], ids=len)
async def test_several_are_lost_in_a_row(
    victims: tuple[str, ...],
    model: Path,
    requests: tuple[GenerationRequest, ...],
    expected: list[Answer],
    tmp_path: Path,
) -> None:
    async with recovering(config(model, tmp_path)) as run:
        tasks = run.start(requests)
        await run.token(Random(SEED).randrange(1, 200))
        for victim in victims:
            run.hurt(victim)
        assert await asyncio.gather(*tasks) == expected
        await run.whole()


async def test_another_is_lost_while_a_new_epoch_loads(
    model: Path, requests: tuple[GenerationRequest, ...], expected: list[Answer], tmp_path: Path
) -> None:
    source = Random(SEED)
    first, second = source.sample("abc", 2)

    async with recovering(config(model, tmp_path)) as run:

        def hurt_another(text: str) -> None:
            if text.startswith("new plan") and not hurt:  # the first victim may be back by then
                hurt.append(second)
                run.hurt(second)

        hurt: list[str] = []
        run.on_event = hurt_another
        tasks = run.start(requests)
        await run.token(source.randrange(1, 200))
        run.hurt(first)
        assert await asyncio.gather(*tasks) == expected
        assert hurt == [second]
        await run.whole()


async def test_a_loss_while_the_first_epoch_loads(
    model: Path, requests: tuple[GenerationRequest, ...], expected: list[Answer], tmp_path: Path
) -> None:
    victim = Random(SEED).choice("abc")
    async with recovering(
        config(model, tmp_path), at_plan=lambda: os.kill(worker_pids()[victim], signal.SIGKILL)
    ) as run:
        assert f"worker {victim} " in run.told[0]
        assert await asyncio.gather(*run.start(requests)) == expected
        await run.whole()


_SLOW_MOVE = """
# A load beside a serving stage takes a minute.
import time

import llamaclust.worker.weights.load as load

make_runner = load._runner

def slow(order, device, model, progress):
    if not order.exclusive:
        open({marker!r}, "w").close()
        for _ in range(6000):
            progress.add(1)
            time.sleep(0.01)
    return make_runner(order, device, model, progress)

load._runner = slow
"""


async def test_a_loss_during_a_planned_move_is_not_kept_waiting_by_its_loads(
    model: Path,
    requests: tuple[GenerationRequest, ...],
    expected: list[Answer],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    marker = tmp_path / "loads"
    run_in_workers(monkeypatch, tmp_path, _SLOW_MOVE.format(marker=str(marker)), "c")
    async with recovering(config(model, tmp_path)) as run:
        drain = asyncio.create_task(run.cluster.pool.operations.drain("a"))
        await run.until("the load", marker.exists)
        tasks = run.start(requests)
        run.hurt("b")
        async with asyncio.timeout(45):
            assert await asyncio.gather(*tasks) == expected
        await drain
        assert any("worker b" in text and "is lost" in text for text in run.told)
        assert not any("worker c" in text and "is lost" in text for text in run.told)

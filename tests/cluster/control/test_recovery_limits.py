"""Tests of losses that leave too few workers: requests wait for a while, and the cluster for longer."""

from __future__ import annotations

import asyncio
import errno
import re
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from llamaclust.cluster.config.cluster_config import ClusterConfig
from llamaclust.cluster.control import planning
from llamaclust.cluster.control.epochs import Epoch, Epochs, StageLoadError
from llamaclust.cluster.engine.engine import EngineState
from llamaclust.cluster.launchers.local import LocalLauncher
from llamaclust.cluster.launchers.restarts import RestartLimits
from llamaclust.cluster.launchers.worker_process import worker_command
from llamaclust.cluster.membership.worker_handle import WorkerHandle
from llamaclust.cluster.scheduler.requests import GenerationRequest
from llamaclust.core.epochs import epoch_number
from llamaclust.core.errors import InsufficientMemoryError, LlamaclustError, RequestFailedError, UsageError, WorkerError
from llamaclust.core.sampler.params import SamplingParams
from llamaclust.wire.control.messages import Load, Loaded
from llamaclust.wire.security.token import ClusterToken
from llamaclust.worker.settings import WorkerSettings
from support.clusters.recovering import (
    Answer,
    Recovering,
    answer_of,
    config,
    recovering,
)

TOKENS = 60

_HALVES = [{"worker": "a", "layers": [0, 3]}, {"worker": "b", "layers": [3, 6]}]


def launcher(run: Recovering) -> LocalLauncher:
    found = run.cluster.launcher
    assert isinstance(found, LocalLauncher)
    return found


def small_memory(config: ClusterConfig, resources: planning.ClusterResources) -> dict[str, int]:
    return dict.fromkeys(resources.workers, 13 << 20)


async def start_by_hand(run: Recovering, name: str) -> asyncio.subprocess.Process:
    """Starts a worker without a launcher, which then joins."""
    token = launcher(run).credentials
    assert isinstance(token, ClusterToken)
    settings = WorkerSettings(name=name, join=run.cluster.registry.address, token=token.value, threads=1)
    process = await asyncio.create_subprocess_exec(*worker_command(settings), stdin=asyncio.subprocess.PIPE)
    assert process.stdin is not None
    process.stdin.write(settings.to_json().encode())
    process.stdin.close()
    return process


@pytest.mark.parametrize("why", ["memory", "plan"])
async def test_requests_wait_for_a_worker_to_come_back(
    why: str,
    model: Path,
    requests: tuple[GenerationRequest, ...],
    expected: list[Answer],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Requests that arrive meanwhile wait as well."""
    if why == "memory":
        monkeypatch.setattr(planning, "_memory_shares", small_memory)
    values = {"plan": _HALVES} if why == "plan" else {}
    async with recovering(config(model, tmp_path, workers=2, **values)) as run:
        may_begin = launcher(run)._restarts._begun
        tasks = run.start(requests[:4])
        await run.token(40)
        may_begin.clear()  # a worker that is back before the next plan would delay nothing
        run.hurt("b")
        await run.until("too little", lambda: any("waiting for worker b" in text for text in run.told))
        assert run.cluster.engine.state is EngineState.RECOVERING
        tasks += run.start(requests[4:])
        may_begin.set()
        assert await asyncio.gather(*tasks) == expected
        says = "MiB are missing" if why == "memory" else "the plan needs workers that are not connected: b"
        assert any("waiting for worker b; requests wait 120 s at most" in text and says in text for text in run.told)
        await run.whole()


async def test_requests_that_wait_too_long_fail_and_the_cluster_serves_again_when_a_worker_is_back(
    model: Path, requests: tuple[GenerationRequest, ...], expected: list[Answer], tmp_path: Path
) -> None:
    timeouts = {"recovery": "300ms", "worker": "3s"}
    async with recovering(config(model, tmp_path, workers=2, plan=_HALVES, timeouts=timeouts)) as run:
        engine = run.cluster.engine
        launcher(run)._restarts.limits = RestartLimits(most=0)
        tasks = run.start(requests)
        await run.token(40)
        run.hurt("b")
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        (message,) = {str(answer) for answer in answers}
        assert all(isinstance(answer, WorkerError) for answer in answers)
        assert "worker b (layers [3, 6)) is lost" in message
        assert message.endswith(
            "no worker came back within 0.3 s (timeouts.recovery): the plan needs workers that are not connected: b"
        )
        assert any("worker b is not started again: its process was killed" in text for text in run.told)
        assert engine.state is EngineState.REFUSING and str(engine.error) == message
        with pytest.raises(WorkerError, match="no worker came back"):
            engine.submit(requests[0])
        assert engine.scheduler.counts.kv_blocks_held == 0
        by_hand = await start_by_hand(run, "b")
        await run.whole()
        assert engine.error is None
        assert await asyncio.gather(*run.start(requests)) == expected
    async with asyncio.timeout(60):
        assert await by_hand.wait() == 0


async def test_failures_between_which_requests_are_answered_end_none(
    model: Path, requests: tuple[GenerationRequest, ...], expected: list[Answer], tmp_path: Path
) -> None:
    async with recovering(config(model, tmp_path, workers=2)) as run:
        long = run.start(requests[:1])
        for number in range(4):
            await run.token(run.tokens + 2)
            await answer_of(
                run.cluster.engine.submit(GenerationRequest(f"short {number}", (5, 6), 1, SamplingParams()))
            )
            assert not long[0].done()
            run.cluster.engine.lane_lost(run.cluster.engine._lane, WorkerError("a failure"))
        assert await asyncio.gather(*long) == expected[:1]
        assert run.cluster.supervisor.recoveries == 4


async def test_a_request_that_fails_again_and_again_ends_and_others_are_served(
    model: Path,
    requests: tuple[GenerationRequest, ...],
    expected: list[Answer],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each result is replaced by a failure, because a result between two failures would clear the request."""
    async with recovering(config(model, tmp_path, workers=2)) as run:
        engine, numbers = run.cluster.engine, count()

        def fails(*_: object) -> None:
            engine.lane_lost(engine._lane, WorkerError(f"failure {next(numbers)}"))

        with monkeypatch.context() as patched:
            patched.setattr(engine, "completed", fails)
            (failing,) = run.start(requests[:1])
            async with asyncio.timeout(60):
                (outcome,) = await asyncio.gather(failing, return_exceptions=True)
        assert isinstance(outcome, RequestFailedError)
        assert re.match(r".*failed 6 times while it .* the last time as the only request: failure", str(outcome)), (
            outcome
        )
        assert await asyncio.gather(*run.start(requests)) == expected


async def test_a_worker_that_cannot_be_spared_is_not(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "_memory_shares", small_memory)
    async with recovering(config(model, tmp_path, workers=2)) as run:
        with pytest.raises(InsufficientMemoryError, match="MiB are missing"):
            await run.cluster.pool.operations.drain("b")
        with pytest.raises(UsageError, match="no worker is named 'x'; the workers are a, b"):
            await run.cluster.pool.operations.drain("x")
        assert not run.cluster.pool.operations.drained
        assert run.cluster.supervisor.epoch.number == epoch_number(term=1, count=1)


async def test_a_worker_whose_layers_do_not_load_elsewhere_keeps_them(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with recovering(config(model, tmp_path, workers=2)) as run:

        async def fails(self: Epochs, *_: object, **__: object) -> Epoch:
            raise StageLoadError(LlamaclustError("layers do not load"), ())

        pool, serving = run.cluster.pool.operations, run.cluster.supervisor.epoch
        name = serving.workers[0].name
        with monkeypatch.context() as patched:
            patched.setattr(Epochs, "open", fails)
            with pytest.raises(WorkerError, match=f"the layers of worker {name} could not be moved: see the log"):
                await pool.drain(name)
        assert not pool.drained
        assert run.cluster.supervisor.epoch is serving


async def test_plans_do_without_who_fails_at_every_load_and_comes_back_at_once(
    model: Path,
    requests: tuple[GenerationRequest, ...],
    expected: list[Answer],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with recovering(config(model, tmp_path)) as run:
        launcher(run)._restarts.limits = RestartLimits(most=1000, first_s=0.0)
        load = WorkerHandle.load

        async def fails(worker: WorkerHandle, order: Load, *rest: Any, **named: Any) -> Loaded:
            if worker.name == "b":
                raise WorkerError("its disk is bad")
            return await load(worker, order, *rest, **named)

        with monkeypatch.context() as patched:
            patched.setattr(WorkerHandle, "load", fails)
            tasks = run.start(requests)
            await run.token(40)
            run.hurt("a")
            assert await asyncio.gather(*tasks) == expected
            assert not run.cluster.supervisor.epoch.holds("b")
        await run.until("b is back", lambda: run.worker("b").loss is None)
        run.cluster.pool.operations.undrain("b")
        await run.whole()


async def test_a_process_for_which_there_is_no_room_now_is_started_later(
    model: Path,
    requests: tuple[GenerationRequest, ...],
    expected: list[Answer],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with recovering(config(model, tmp_path, workers=2)) as run:
        spawn, refused = asyncio.create_subprocess_exec, 0

        async def refusing(*command: str, **options: Any) -> asyncio.subprocess.Process:
            nonlocal refused
            refused += 1
            if refused == 1:
                raise BlockingIOError(errno.EAGAIN, "no process more")
            return await spawn(*command, **options)

        monkeypatch.setattr(asyncio, "create_subprocess_exec", refusing)
        tasks = run.start(requests)
        await run.token(40)
        run.hurt("b")
        assert await asyncio.gather(*tasks) == expected
        await run.whole()
        assert refused == 2


async def test_requests_do_not_wait_for_loads_that_fail_again_and_again(
    model: Path,
    requests: tuple[GenerationRequest, ...],
    expected: list[Answer],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    values = {"plan": _HALVES, "timeouts": {"recovery": "3s", "worker": "3s"}}
    async with recovering(config(model, tmp_path, workers=2, **values)) as run:
        tasks = run.start(requests)
        await run.token(40)

        async def fails(self: Epochs, *_: object, **__: object) -> Epoch:
            raise StageLoadError(LlamaclustError("layers do not load"), ())

        with monkeypatch.context() as patched:
            patched.setattr(Epochs, "open", fails)
            run.cluster.engine.lane_lost(run.cluster.engine._lane, WorkerError("a failure"))
            (message,) = {str(answer) for answer in await asyncio.gather(*tasks, return_exceptions=True)}
            assert message.endswith("no plan could be loaded within 3 s (timeouts.recovery): layers do not load")
        await run.whole()
        assert await asyncio.gather(*run.start(requests)) == expected

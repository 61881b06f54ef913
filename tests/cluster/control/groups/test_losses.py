"""Tests of lost group members in a manual plan: answers are those of one undisturbed worker."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import pytest

from llamaclust.cluster.config.cluster_config import ClusterConfig
from llamaclust.cluster.planner import step_limits
from llamaclust.cluster.scheduler.requests import GenerationRequest
from support.clusters.recovering import Answer, Recovering, config, recovering

TOKENS = 120
GROUP, LAST = ["a", "b", "c"], "d"
SIGNALS = pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=lambda number: number.name)


def grouped(model: Path, folder: Path, **keys: object) -> ClusterConfig:
    """Configures a group for the first layers and another worker for the last ones; no worker is idle."""
    plan = [{"workers": GROUP, "layers": [0, 4], "shares": [2, 1, 1]}, {"worker": LAST, "layers": [4, 6]}]
    return config(model, folder, workers=4, plan=plan, **keys)


def is_lost(run: Recovering, name: str) -> bool:
    return any(f"worker {name} " in text and "is lost" in text for text in run.told)


@pytest.mark.promise
@SIGNALS
@pytest.mark.parametrize("victim", [*GROUP, LAST])
async def test_a_member_is_lost(
    victim: str,
    number: signal.Signals,
    model: Path,
    requests: tuple[GenerationRequest, ...],
    expected: list[Answer],
    tmp_path: Path,
) -> None:
    async with recovering(grouped(model, tmp_path)) as run:
        tasks = run.start(requests)
        await run.token(60)
        run.hurt(victim, number)
        await run.until("a recovery", lambda: run.cluster.supervisor.recoveries == 1)
        assert await asyncio.gather(*tasks) == expected
        assert is_lost(run, victim), run.told
        await run.whole()


@SIGNALS
@pytest.mark.parametrize("victims", ["ab", "bc", "cd", "abc"])
async def test_several_are_lost_at_once(
    victims: str,
    number: signal.Signals,
    model: Path,
    requests: tuple[GenerationRequest, ...],
    expected: list[Answer],
    tmp_path: Path,
) -> None:
    """The last victim gets SIGKILL, the others the given signal."""
    async with recovering(grouped(model, tmp_path)) as run:
        tasks = run.start(requests)
        await run.token(60)
        for victim in victims:
            run.hurt(victim, signal.SIGKILL if victim == victims[-1] else number)
        await run.until("all losses", lambda: all(is_lost(run, victim) for victim in victims))
        assert await asyncio.gather(*tasks) == expected
        await run.whole()


@SIGNALS
@pytest.mark.parametrize("victim", ["a", "c"])
@pytest.mark.parametrize("comes", ["at once", "when the loss is known", "when the group is whole"])
async def test_a_member_is_lost_while_there_is_no_request(
    comes: str,
    victim: str,
    number: signal.Signals,
    model: Path,
    requests: tuple[GenerationRequest, ...],
    expected: list[Answer],
    tmp_path: Path,
) -> None:
    """The member is lost before the first requests, and again before the next ones."""
    async with recovering(grouped(model, tmp_path)) as run:
        for begin in (0, 4):
            told = len(run.told)
            run.hurt(victim, number)
            if comes != "at once":
                await run.until(
                    "the loss",
                    lambda told=told: any("is lost" in text for text in run.told[told:]),  # type: ignore[misc]
                )
            if comes == "when the group is whole":
                await run.whole()
            batch = slice(begin, begin + 4)
            assert await asyncio.gather(*run.start(requests[batch])) == expected[batch]
            await run.whole()
        assert run.cluster.supervisor.recoveries == 2, run.told


@pytest.mark.parametrize("victim", [*GROUP, LAST])
async def test_a_member_that_stops_for_a_while_is_waited_for(
    victim: str,
    model: Path,
    requests: tuple[GenerationRequest, ...],
    expected: list[Answer],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The pause is shorter than `timeouts.worker`, and the other workers send heartbeats meanwhile."""
    monkeypatch.setattr(step_limits, "_LEAST_S", 60.0)
    async with recovering(grouped(model, tmp_path, timeouts={"worker": "60s"})) as run:
        tasks = run.start(requests)
        for count in (60, 300):
            await run.token(count)
            run.hurt(victim, signal.SIGSTOP)
            others = [name for name in (*GROUP, LAST) if name != victim]
            for _ in range(3):
                seen = {name: run.worker(name).heartbeat for name in others}
                await run.until(
                    "heartbeats",
                    lambda seen=seen: all(run.worker(name).heartbeat is not seen[name] for name in seen),  # type: ignore[misc]
                )
            run.hurt(victim, signal.SIGCONT)
        assert await asyncio.gather(*tasks) == expected
        assert run.cluster.supervisor.recoveries == 0, run.told

"""Groups whose members are lost or moved in mid-answer: answers are those of one undisturbed worker."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import pytest

from llamaclust.cluster.config.cluster_config import ClusterConfig
from llamaclust.cluster.scheduler.requests import GenerationRequest
from support.clusters.recovering import Answer, config, recovering

TOKENS = 120


def grouped(model: Path, folder: Path) -> ClusterConfig:
    """A group of a and b holds the first layers, c the last ones."""
    plan = [
        {"workers": ["a", "b"], "layers": [0, 4], "shares": [2, 1]},
        {"worker": "c", "layers": [4, 6]},
    ]
    return config(model, folder, plan=plan)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
@pytest.mark.parametrize("victim", ["a", "b", "c"])
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
        assert any(f"worker {victim} " in text and "is lost" in text for text in run.told), run.told
        await run.whole()

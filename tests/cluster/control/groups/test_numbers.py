"""Checks that a group member whose numbers are not finite is excluded, its leader is not, and no answer changes."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from llamaclust.cluster.scheduler.requests import GenerationRequest
from support.clusters.faults.worker_faults import break_worker
from support.clusters.recovering import Answer, recovering
from support.plans.automatic_groups import NAMES, NEAR_S, automatic, grouped, measured

TOKENS = 40


@pytest.mark.parametrize("member", NAMES)
async def test_the_member_is_left_out(
    member: str,
    model: Path,
    requests: tuple[GenerationRequest, ...],
    expected: list[Answer],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The member is the leader of a group of all workers, or another one."""
    break_worker(monkeypatch, tmp_path, member, "a portion that is not finite")
    async with recovering(automatic(model, tmp_path)) as run:
        measured(run, NEAR_S)
        await grouped(run)
        assert await asyncio.gather(*run.start(requests)) == expected
        (notice,) = [text for text in run.told if "is quarantined" in text]
        assert notice.startswith(f"worker {member} is quarantined for 10 s unless the model needs it"), run.told
        assert f"worker {member} twice computed numbers that are not finite" in notice
        assert not run.cluster.supervisor.epoch.holds(member)

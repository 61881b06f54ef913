"""Checks that a group member that fails without exiting is named, and no other; all send heartbeats meanwhile."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from llamaclust.cluster.config.cluster_config import ClusterConfig
from llamaclust.cluster.control.failures import quarantine
from llamaclust.cluster.planner import step_limits
from llamaclust.cluster.scheduler.requests import GenerationRequest
from llamaclust.cluster.server import start
from llamaclust.core.backoff import Backoff
from llamaclust.core.errors import RequestFailedError, WorkerError
from support.clusters.faults.worker_faults import break_worker
from support.clusters.recovering import Recovering, config, recovering

TOKENS = 40
LEADER, FOLLOWER = "a", "b"
FAULTS = (
    ("raises", (LEADER, FOLLOWER)),
    ("no memory in a step", (LEADER, FOLLOWER)),
    ("breaks the protocol in a step", (LEADER,)),
    ("another epoch", (LEADER, FOLLOWER)),
    ("another step", (LEADER, FOLLOWER)),
    ("another gather", (LEADER, FOLLOWER)),
    ("closes its links", (LEADER, FOLLOWER)),
    ("announces rubbish", (LEADER,)),
)
CASES = [pytest.param(fault, member, id=f"{member}, {fault}") for fault, members in FAULTS for member in members]


def grouped(model: Path, folder: Path) -> ClusterConfig:
    """Configures a group of three for the first layers and d for the last ones; no worker is idle."""
    plan = [{"workers": ["a", "b", "c"], "layers": [0, 4], "shares": [2, 1, 1]}, {"worker": "d", "layers": [4, 6]}]
    return config(model, folder, workers=4, plan=plan)


def losses(run: Recovering) -> list[str]:
    return [text for text in run.told if "is lost" in text]


@pytest.mark.parametrize(("fault", "member"), CASES)
async def test_the_member_at_fault_is_named_and_its_partners_are_not(
    fault: str,
    member: str,
    model: Path,
    requests: tuple[GenerationRequest, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(quarantine, "_RETRY", Backoff(first_s=0.01, max_s=0.01))
    break_worker(monkeypatch, tmp_path, member, fault)
    async with recovering(grouped(model, tmp_path)) as run:
        for outcome in await asyncio.gather(*run.start(requests[:2]), return_exceptions=True):
            assert isinstance(outcome, WorkerError) and not isinstance(outcome, RequestFailedError), outcome
            assert f"failed 6 times, each time at worker {member}, and no other worker" in str(outcome)
        records = run.cluster.supervisor.store.state.pool.quarantine.records
        assert records.keys() == {member}, run.told
        assert all(handle.loss is None for handle in run.cluster.registry.workers.values())


@pytest.mark.parametrize("member", ["a", "b", "c"])
async def test_a_member_whose_step_does_not_end_is_lost_and_its_partners_are_not(
    member: str,
    model: Path,
    requests: tuple[GenerationRequest, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The loss is reported long before the deadline of the gather at which the partners wait."""
    monkeypatch.setattr(step_limits, "_LEAST_S", 2.0)
    monkeypatch.setattr(start, "_HEARTBEATS", 30)  # Old progress would blame a healthy stage.
    break_worker(monkeypatch, tmp_path, member, "stuck in a step")
    async with recovering(grouped(model, tmp_path)) as run:
        tasks = run.start(requests[:2])
        await run.until("two losses", lambda: len(losses(run)) >= 2)
        for text in losses(run):
            assert f"worker {member} " in text and ("it hangs" in text or "it does not answer" in text), run.told
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

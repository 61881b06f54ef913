"""Checks that a request that breaks the workers that compute it fails alone and soon; other answers do not change."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from llamaclust.cluster.control.failures import quarantine
from llamaclust.cluster.scheduler.requests import GenerationRequest
from llamaclust.cluster.scheduler.strikes import MAX_STRIKES
from llamaclust.core.backoff import Backoff
from llamaclust.core.errors import RequestFailedError
from support.clusters.faults.worker_program import run_in_workers
from support.clusters.recovering import Answer, Recovering, config, recovering

TOKENS = 150
MIXES = 4

POISON = 666
WITHIN_S = 60.0  # five on an idle machine
_POISONED = f"""
# A worker cannot sample for a request with this seed.
import os

from llamaclust.worker.stage.loop import StageLoop
from llamaclust.worker.stage.step_inputs import StepInputs
from support.wire.slow_codec import plain_inputs

finish, read, poison = StageLoop._finish, StepInputs.read, dict()

def notes(data):
    inputs = plain_inputs(data)
    risky = [task.position for task in inputs.tasks if getattr(task, "seed", 0) == {POISON}]
    poison[inputs.number] = any(position >= 30 for position in risky)
    return read(data)

def poisoned(loop, arrival, logits, received):
    if poison[arrival.frame.number]:
        BREAK
    return finish(loop, arrival, logits, received)

StepInputs.read = notes
StageLoop._finish = poisoned
"""
BREAKS = {"raises": 'raise ValueError("poison")', "kills its worker": "os.kill(os.getpid(), 9)"}


async def fails(run: Recovering) -> None:
    """Checks that a poisoned request ends with an error of its own, in time."""
    (task,) = run.start([GenerationRequest("poison", tuple(range(3, 23)), 60, seed=POISON)])
    with pytest.raises(RequestFailedError, match=f"the pipeline failed {MAX_STRIKES} times while it"):
        async with asyncio.timeout(WITHIN_S):
            await task
    await run.until("no quarantine", lambda: not run.cluster.supervisor.store.state.inputs.quarantined)


@pytest.mark.promise
@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("what", BREAKS)
async def test_a_request_that_breaks_workers_fails_alone(
    what: str,
    workers: int,
    model: Path,
    requests: tuple[GenerationRequest, ...],
    expected: list[Answer],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The request is sent twice: the launcher would not restart a worker so often if the worker were to blame."""
    monkeypatch.setattr(quarantine, "_BACKOFF", Backoff(first_s=600.0, max_s=600.0))  # Time releases no worker.
    run_in_workers(monkeypatch, tmp_path, _POISONED.replace("BREAK", BREAKS[what]))
    async with recovering(config(model, tmp_path, workers)) as run:
        others = run.start(requests)
        await run.token(100)
        await fails(run)
        assert await asyncio.gather(*others) == expected
        await fails(run)
        assert await asyncio.gather(*run.start(requests[:8])) == expected[:8]
        assert not any("not started again" in text for text in run.told)
        await run.whole()

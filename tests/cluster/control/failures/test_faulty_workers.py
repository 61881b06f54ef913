"""Checks that a worker that fails without exiting is excluded before a request fails, and no answer changes."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path

import pytest

from llamaclust.cluster.control.failures import quarantine
from llamaclust.cluster.planner import step_limits
from llamaclust.cluster.scheduler.requests import GenerationRequest
from llamaclust.cluster.server import start
from llamaclust.core.backoff import Backoff
from llamaclust.core.errors import RequestFailedError, WorkerError
from support.clusters.faults.worker_faults import NOT_FINITE_SEED, break_worker
from support.clusters.recovering import Answer, Recovering, config, recovering

TOKENS = 60
SILENT = "it does not answer: microbatch"
POSITIONS = {"first": "a", "middle": "b", "last": "c"}
_THIRDS = [{"worker": name, "layers": [start, start + 2]} for name, start in (("a", 0), ("b", 2), ("c", 4))]


@dataclass(frozen=True, slots=True)
class Kind:
    """A fault, and its course until the worker is excluded. `loss`: why the worker is lost each time, before it joins
    again; "": it stays connected."""

    fault: str
    recoveries: int = 2
    loss: str = ""
    positions: tuple[str, ...] = ("first", "middle", "last")
    manual: str = "failed 6 times, each time at worker {worker}, and no other worker could take its layers"
    """Error of requests with the user's plan, if no other worker may take the layers; "": no error, because each
    recovery yields some tokens."""


KINDS = (
    Kind("raises"),
    Kind("raises for some rows"),
    Kind("not finite", 1, manual="the logits are not finite numbers"),
    Kind("mute", loss=SILENT),
    Kind("deaf", loss=SILENT),
    Kind("mute to the first", loss=SILENT, positions=("last",), manual=""),
    Kind("sends rubbish", positions=("first", "middle")),
    Kind("defers", loss="a deferred row that has no matcher", positions=("last",)),
)
SCENARIOS = [pytest.param(kind, place, id=f"{place}, {kind.fault}") for kind in KINDS for place in kind.positions]
MANUAL = [
    pytest.param(kind, place, id=f"{place}, {kind.fault}") for kind in KINDS for place in kind.positions if kind.manual
]


def notices(run: Recovering) -> list[str]:
    return [text for text in run.told if "is quarantined" in text]


def quarantined(run: Recovering, name: str) -> None:
    """Checks that this worker alone is quarantined."""
    (notice,) = notices(run)
    assert notice.startswith(f"worker {name} is quarantined for 10 s unless the model needs it: it failed 2 times")


async def answers_without(run: Recovering, worker: str, requests: tuple[GenerationRequest, ...]) -> list[Answer]:
    """Loses a worker while it computes these requests, and returns their answers."""
    tasks, before = run.start(requests), run.tokens
    await run.token(before + 40)
    run.hurt(worker)
    return await asyncio.gather(*tasks)


@pytest.mark.parametrize(("kind", "place"), SCENARIOS)
async def test_a_worker_that_fails_is_left_out_before_a_request_fails(
    kind: Kind,
    place: str,
    model: Path,
    requests: tuple[GenerationRequest, ...],
    expected: list[Answer],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The faulty worker continues to send heartbeats."""
    worker = POSITIONS[place]
    if kind.loss == SILENT:
        monkeypatch.setattr(step_limits, "_LEAST_S", 2.0)
        monkeypatch.setattr(start, "_HEARTBEATS", 30)  # Old progress would blame a healthy stage.
    break_worker(monkeypatch, tmp_path, worker, kind.fault)
    async with recovering(config(model, tmp_path)) as run:
        assert await asyncio.gather(*run.start(requests)) == expected
        while not notices(run):  # On a busy machine, requests may end before some faults show.
            await run.until("its return", lambda: run.is_whole or bool(notices(run)))
            assert await asyncio.gather(*run.start(requests)) == expected
        quarantined(run, worker)
        lost = [text for text in run.told if "is lost" in text and text not in notices(run)]
        assert [text.startswith(f"worker {worker} (layers") and kind.loss in text for text in lost] == (
            [True] * kind.recoveries if kind.loss else []
        )
        assert run.cluster.supervisor.recoveries == kind.recoveries
        assert not run.cluster.supervisor.epoch.holds(worker)


@pytest.mark.parametrize(("kind", "place"), MANUAL)
async def test_requests_fail_by_the_name_of_a_worker_that_no_other_one_may_replace(
    kind: Kind,
    place: str,
    model: Path,
    requests: tuple[GenerationRequest, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Clients may repeat these requests: the error is the server's."""
    worker = POSITIONS[place]
    if kind.loss == SILENT:
        monkeypatch.setattr(step_limits, "_LEAST_S", 2.0)
        monkeypatch.setattr(start, "_HEARTBEATS", 30)  # Old progress would blame a healthy stage.
    monkeypatch.setattr(quarantine, "_RETRY", Backoff(first_s=0.01, max_s=0.01))
    break_worker(monkeypatch, tmp_path, worker, kind.fault)
    async with recovering(config(model, tmp_path, plan=_THIRDS)) as run:
        for outcome in await asyncio.gather(*run.start(requests[:2]), return_exceptions=True):
            assert isinstance(outcome, WorkerError) and not isinstance(outcome, RequestFailedError)
            assert outcome.http_status == 503
            assert kind.manual.format(worker=worker) in str(outcome)
        assert {text.split()[1] for text in notices(run)} <= {worker}, "no other one is suspected"


async def test_a_worker_that_holds_the_whole_model_and_fails_is_replaced(
    model: Path,
    requests: tuple[GenerationRequest, ...],
    expected: list[Answer],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    break_worker(monkeypatch, tmp_path, "b", "raises")
    workers = [
        {"name": name, "threads": 1, "memory_bandwidth_gb_s": speed, "int8_gmac_s": 300.0}
        for name, speed in (("a", 10.0), ("b", 20.0))
    ]
    async with recovering(config(model, tmp_path, workers, objective="latency")) as run:
        assert [stage.worker for stage in run.cluster.supervisor.epoch.plan.stages] == ["b"]
        assert await asyncio.gather(*run.start(requests)) == expected
        quarantined(run, "b")


async def test_a_worker_that_is_lost_again_and_again_does_not_interrupt_the_others_each_time(
    model: Path, requests: tuple[GenerationRequest, ...], expected: list[Answer], tmp_path: Path
) -> None:
    async with recovering(config(model, tmp_path)) as run:
        for count in (1, 2):
            await run.whole()
            assert await answers_without(run, "c", requests) == expected
            await run.until("its recovery", lambda count=count: run.cluster.supervisor.recoveries == count)  # type: ignore[misc]
        await run.until("the quarantine", lambda: bool(notices(run)))
        quarantined(run, "c")
        for count in range(2, 4):
            await run.until("its return", lambda count=count: sum("c joined" in text for text in run.told) == count)  # type: ignore[misc]
            assert await answers_without(run, "c", requests) == expected
        assert run.cluster.supervisor.recoveries == 2, "it held no layers any more"


async def test_a_request_whose_rows_have_no_result_on_any_worker_ends_and_releases_them(
    model: Path,
    requests: tuple[GenerationRequest, ...],
    expected: list[Answer],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A second such request causes no recovery."""
    break_worker(monkeypatch, tmp_path, "", "not finite for one")
    async with recovering(config(model, tmp_path)) as run:
        others = run.start(requests)
        for recoveries in (1, 1):
            (ending,) = run.start([GenerationRequest("not finite", tuple(range(3, 23)), 5, seed=NOT_FINITE_SEED)])
            with pytest.raises(WorkerError, match="the logits are not finite numbers"):
                await ending
            assert run.cluster.supervisor.recoveries == recoveries
            await run.until("the release", lambda: not run.cluster.supervisor.store.state.inputs.quarantined)
        assert await asyncio.gather(*others) == expected


@pytest.mark.parametrize("worker", POSITIONS.values(), ids=POSITIONS)
async def test_a_start_goes_on_without_a_worker_whose_file_is_damaged(
    worker: str,
    model: Path,
    requests: tuple[GenerationRequest, ...],
    expected: list[Answer],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    break_worker(monkeypatch, tmp_path, worker, "damaged file")
    async with recovering(config(model, tmp_path)) as run:
        assert await asyncio.gather(*run.start(requests)) == expected
        (notice,) = notices(run)
        assert notice.startswith(f"worker {worker} is quarantined for 10 s unless the model needs it: ")
        assert notice.endswith(f"{model}: it is damaged")
        assert not run.cluster.supervisor.epoch.holds(worker) and run.cluster.supervisor.recoveries == 0

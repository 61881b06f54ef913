"""One worker of several fails without dying: it is left out before a request fails, and no answer changes."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from llamaclust.cluster.control.failures import quarantine
from llamaclust.cluster.planner import step_limits
from llamaclust.cluster.scheduler.requests import GenerationRequest
from llamaclust.core.backoff import Backoff
from llamaclust.core.errors import RequestFailedError, WorkerError
from support.clusters.faults.worker_faults import (
    DEAF,
    DEFERS,
    MUTE,
    MUTE_TO_FIRST,
    NOT_FINITE,
    NOT_FINITE_FOR_ONE,
    NOT_FINITE_SEED,
    RAISES,
    SOME_ROWS,
    break_worker,
)
from support.clusters.recovering import Answer, Recovering, config, recovering

TOKENS = 60

FAULTS = {"raises": RAISES, "raises for some rows": SOME_ROWS}
RECOVERIES = {"raises": 2, "raises for some rows": 2, "not finite": 1}
_HALVES = [{"worker": "a", "layers": [0, 3]}, {"worker": "b", "layers": [3, 6]}]


def notices(run: Recovering) -> list[str]:
    return [text for text in run.told if "where the others suffice" in text]


def quarantined(run: Recovering, name: str) -> None:
    """It is, and no other one."""
    (notice,) = notices(run)
    assert notice.startswith(f"worker {name} gets no layers for 10 s where the others suffice: it failed 2 times")


@pytest.mark.parametrize("worker", ["a", "b", "c"], ids=["first", "middle", "last"])
@pytest.mark.parametrize("what", RECOVERIES)
async def test_a_worker_that_fails_is_left_out_before_a_request_fails(
    what: str,
    worker: str,
    model: Path,
    requests: tuple[GenerationRequest, ...],
    expected: list[Answer],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    break_worker(monkeypatch, tmp_path, worker, {**FAULTS, "not finite": NOT_FINITE}[what])
    async with recovering(config(model, tmp_path)) as run:
        assert await asyncio.gather(*run.start(requests)) == expected
        quarantined(run, worker)
        assert not run.cluster.supervisor.epoch.holds(worker)
        assert run.cluster.supervisor.recoveries == RECOVERIES[what]
        assert run.worker(worker).loss is None, "it is alive, and tried again later"


async def test_a_worker_that_holds_the_whole_model_and_fails_is_replaced(
    model: Path,
    requests: tuple[GenerationRequest, ...],
    expected: list[Answer],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    break_worker(monkeypatch, tmp_path, "b", RAISES)
    workers = [
        {"name": name, "threads": 1, "memory_bandwidth_gb_s": speed, "int8_gmac_s": 300.0}
        for name, speed in (("a", 10.0), ("b", 20.0))
    ]
    async with recovering(config(model, tmp_path, workers, objective="latency")) as run:
        assert [stage.worker for stage in run.cluster.supervisor.epoch.plan.stages] == ["b"]
        assert await asyncio.gather(*run.start(requests)) == expected
        quarantined(run, "b")


@pytest.mark.parametrize("what", FAULTS)
async def test_requests_fail_by_the_name_of_a_worker_that_no_other_one_can_replace(
    what: str,
    model: Path,
    requests: tuple[GenerationRequest, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They may be sent again: the fault is the server's."""
    monkeypatch.setattr(quarantine, "_RETRY", Backoff(first_s=0.01, max_s=0.01))
    break_worker(monkeypatch, tmp_path, "b", FAULTS[what])
    async with recovering(config(model, tmp_path, workers=2, plan=_HALVES)) as run:
        outcomes = await asyncio.gather(*run.start(requests[:2]), return_exceptions=True)
        for outcome in outcomes:
            assert isinstance(outcome, WorkerError) and not isinstance(outcome, RequestFailedError)
            assert outcome.http_status == 503
            assert "failed 6 times, each time at worker b, and no other one could take its layers" in str(outcome)
        quarantined(run, "b")


LOST = {
    "first is mute": ("a", MUTE, "it does not answer: microbatch"),
    "middle is mute": ("b", MUTE, "it does not answer: microbatch"),
    "last is mute": ("c", MUTE, "it does not answer: microbatch"),
    "first is deaf": ("a", DEAF, "it does not answer: microbatch"),
    "middle is deaf": ("b", DEAF, "it does not answer: microbatch"),
    "last is deaf": ("c", DEAF, "it does not answer: microbatch"),
    "last is mute to the first": ("c", MUTE_TO_FIRST, "it does not answer: microbatch"),
    "last defers for ever": ("c", DEFERS, "a deferred row that has no matcher"),
}


@pytest.mark.parametrize("what", LOST)
async def test_a_worker_whose_answers_do_not_come_counts_as_lost_until_it_is_left_out(
    what: str,
    model: Path,
    requests: tuple[GenerationRequest, ...],
    expected: list[Answer],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It joins again each time, and heartbeats come all the while."""
    worker, fault, says = LOST[what]
    monkeypatch.setattr(step_limits, "_LEAST_S", 1.0)
    break_worker(monkeypatch, tmp_path, worker, fault)
    async with recovering(config(model, tmp_path)) as run:
        assert await asyncio.gather(*run.start(requests)) == expected
        await run.until("its return", lambda: run.is_whole or bool(notices(run)))
        assert await asyncio.gather(*run.start(requests)) == expected
        quarantined(run, worker)
        lost = [text for text in run.told if "is lost" in text and text not in notices(run)]
        assert [text.startswith(f"worker {worker} (layers") and says in text for text in lost] == [True, True]


async def test_a_worker_that_is_lost_again_and_again_does_not_interrupt_the_others_each_time(
    model: Path, requests: tuple[GenerationRequest, ...], expected: list[Answer], tmp_path: Path
) -> None:
    async with recovering(config(model, tmp_path)) as run:
        for count in (1, 2):
            await run.whole()
            tasks, before = run.start(requests), run.tokens
            await run.token(before + 40)
            run.hurt("c")
            assert await asyncio.gather(*tasks) == expected
            await run.until("its recovery", lambda count=count: run.cluster.supervisor.recoveries == count)  # type: ignore[misc]
        await run.until("the quarantine", lambda: bool(notices(run)))
        quarantined(run, "c")
        for count in range(2, 4):
            await run.until("its return", lambda count=count: sum("c is here" in text for text in run.told) == count)  # type: ignore[misc]
            tasks, before = run.start(requests), run.tokens
            await run.token(before + 40)
            run.hurt("c")
            assert await asyncio.gather(*tasks) == expected
        assert run.cluster.supervisor.recoveries == 2, "it held no layers any more"


async def test_a_request_whose_rows_have_no_result_on_any_worker_ends_and_releases_them(
    model: Path,
    requests: tuple[GenerationRequest, ...],
    expected: list[Answer],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The next one like it interrupts nothing."""
    break_worker(monkeypatch, tmp_path, "", NOT_FINITE_FOR_ONE)
    async with recovering(config(model, tmp_path)) as run:
        others = run.start(requests)
        for recoveries in (1, 1):
            (ending,) = run.start([GenerationRequest("not finite", tuple(range(3, 23)), 5, seed=NOT_FINITE_SEED)])
            with pytest.raises(WorkerError, match="the logits are not finite numbers"):
                await ending
            assert run.cluster.supervisor.recoveries == recoveries
            await run.until("the release", lambda: not run.cluster.supervisor.observed.state.inputs.quarantined)
        assert await asyncio.gather(*others) == expected

"""Tests of drafted rows on real clusters and models: tokens and logprob bits are those of one worker without drafts."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from llamaclust.cluster.client.local import LocalClient
from llamaclust.cluster.launchers.in_process import LocalSettings
from llamaclust.cluster.scheduler.requests import GenerationRequest
from llamaclust.cluster.scheduler.speculation import speculation
from llamaclust.cluster.scheduler.speculation.costs import MeasuredRounds
from llamaclust.core.sampler.params import SamplingParams
from support.clusters.recovering import (
    CONTEXT,
    Answer,
    answer_of,
    config,
    generations,
    model_in,
    recovering,
    undisturbed,
)
from support.plans.drafting import AnyWindows, draft
from support.seed import SEED

VOCABULARY = 320
REQUESTS = generations(SEED)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_in(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def expected(model: Path) -> list[Answer]:
    return undisturbed(model, REQUESTS)


@pytest.fixture
def windows(expected: list[Answer], monkeypatch: pytest.MonkeyPatch) -> AnyWindows:
    return draft(texts(REQUESTS, expected), Random(SEED), VOCABULARY, monkeypatch)


def texts(requests: tuple[GenerationRequest, ...], answers: list[Answer]) -> list[list[int]]:
    """Returns each prompt with its answer, as token ids."""
    found = []
    for request, answer in zip(requests, answers, strict=True):
        scored = 0 if request.score_from is None else len(request.prompt) - 1
        found.append([*request.prompt, *(token for token, _ in answer[scored:])])
    return found


@pytest.mark.promise
@pytest.mark.parametrize("workers", [1, 2, 3])
async def test_any_cut_gives_the_same_answers(
    model: Path, expected: list[Answer], windows: AnyWindows, workers: int, tmp_path: Path
) -> None:
    async with recovering(config(model, tmp_path, workers)) as run:
        assert await asyncio.gather(*run.start(REQUESTS)) == expected, f"seed {SEED}"
    assert windows.rows > 100


@pytest.mark.parametrize("victim", ["a", "b", "c"])
async def test_a_worker_that_is_lost_within_windows_changes_nothing(
    model: Path, expected: list[Answer], windows: AnyWindows, victim: str, tmp_path: Path
) -> None:
    async with recovering(config(model, tmp_path)) as run:
        answering = run.start(REQUESTS)
        await run.token(200)
        await run.until("a window", lambda: any(s.drafting.ahead for s in run.cluster.engine.scheduler.sequences))
        before = windows.rows
        run.hurt(victim)
        assert await asyncio.gather(*answering) == expected, f"seed {SEED}"
    assert windows.rows > before + 20


async def test_aborts_and_preemptions_within_windows_change_nothing(
    model: Path, expected: list[Answer], windows: AnyWindows
) -> None:
    client = LocalClient(model, threads=1, settings=LocalSettings(CONTEXT, kv_blocks=40))
    async with client._stage.serve() as service:
        engine = service._engine
        begun = asyncio.Event()
        leaving = [asyncio.create_task(answer_of(engine.submit(request), begun.set)) for request in REQUESTS[:3]]
        answering = [asyncio.create_task(answer_of(engine.submit(request))) for request in REQUESTS]
        async with asyncio.timeout(60):
            await begun.wait()
        for task in leaving:
            task.cancel()
        assert await asyncio.gather(*answering) == expected, f"seed {SEED}"
        assert engine.counts.preemptions > 0
        assert engine.counts.kv_blocks_held == 0


@pytest.mark.parametrize("most", [1, 2, 5, 17, 32])
async def test_windows_of_each_size(
    model: Path, expected: list[Answer], windows: AnyWindows, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speculation, "best_windows", sized := AnyWindows(Random(SEED), most))
    client = LocalClient(model, threads=1, settings=LocalSettings(CONTEXT))
    async with client._stage.serve() as service:
        found = [await answer_of(service._engine.submit(request)) for request in REQUESTS]
    assert found == expected, f"seed {SEED}"
    assert sized.rows > 50


async def test_stops_choices_and_biases_are_those_of_single_steps(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests have stop tokens within a window, `min_tokens`, several choices with one seed, and logit biases."""
    source = Random(SEED)
    requests = tuple(
        replace(
            request,
            choice=number % 3,
            seed=5,
            stop_token_ids=frozenset(source.sample(range(VOCABULARY), 12)),
            min_tokens=source.choice([0, 9, 40]),
            top_logprobs=number % 4,
            params=replace(request.params, logit_bias=((3, 2.0), (9 + number, 4.0))),
        )
        for number, request in enumerate(REQUESTS)
    )
    alone = await asyncio.to_thread(undisturbed, model, requests)
    windows = draft(texts(requests, alone), source, VOCABULARY, monkeypatch)
    client = LocalClient(model, threads=1, settings=LocalSettings(CONTEXT))
    async with client._stage.serve() as service:
        answering = [answer_of(service._engine.submit(request)) for request in requests]
        assert await asyncio.gather(*answering) == alone, f"seed {SEED}"
    assert windows.rows > 20
    assert any(len(answer) < request.max_new_tokens for request, answer in zip(requests, alone, strict=True))


async def test_drafts_without_a_gain_are_not_computed(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The drafter and the controller are the real ones, and the model's answers have no repetitions. Few drafted rows
    are wasted."""
    monkeypatch.setattr(MeasuredRounds, "plain_ns", lambda self, sequences, groups: 1e6)
    monkeypatch.setattr(MeasuredRounds, "window_ns", lambda self, rows, groups: 1e6 + 2e5 * rows)
    request = GenerationRequest("r", tuple(range(3, 90)), 120, SamplingParams(temperature=3.0), seed=SEED)
    client = LocalClient(model, threads=1, settings=LocalSettings(CONTEXT))
    async with client._stage.serve() as service:
        stream = service._engine.submit(request)
        (sequence,) = service._engine.scheduler.sequences
        await answer_of(stream)
    assert sequence.drafting.rows - sequence.drafting.accepted < 60

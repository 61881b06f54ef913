"""Tests of request features with groups: ids and logprob bits are those of one undisturbed worker."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from functools import cache
from pathlib import Path
from random import Random

import pytest

from llamaclust.cluster.scheduler.drafting.ngram import NgramDrafters
from llamaclust.cluster.scheduler.requests import GenerationRequest
from llamaclust.cluster.scheduler.speculation import model_drafts, speculation
from llamaclust.model.loader import Model
from support.chat.constrained_requests import grammar_requests, reasoning_requests
from support.clusters.recovering import (
    Answer,
    answer_of,
    config,
    generations,
    model_in,
    recovering,
    undisturbed,
)
from support.models.tiny_architectures import build_architecture
from support.plans.draft_models import MOST_ROWS, wait_for_any
from support.plans.drafting import AnyWindows, SaidDrafters, draft
from support.seed import SEED
from support.several_models.cluster import ASLEEP, AWAKE, model_files, models

VOCABULARY = 320
PLANS = {
    "one group": ({"workers": ["a", "b"], "layers": [0, 6], "shares": [2, 1]},),
    "a group and a worker": (
        {"workers": ["a", "b"], "layers": [0, 4], "shares": [1, 1]},
        {"worker": "c", "layers": [4, 6]},
    ),
}
Requests = tuple[GenerationRequest, ...]


def choices(requests: Requests) -> Requests:
    """Adds choices with one seed, stop tokens, `min_tokens`, logit biases and top logprobs to requests."""
    source = Random(SEED)
    return tuple(
        replace(
            request,
            choice=number % 3,
            seed=5,
            stop_token_ids=frozenset(source.sample(range(VOCABULARY), 12)),
            min_tokens=source.choice([0, 9, 30]),
            top_logprobs=number % 4,
            params=replace(request.params, logit_bias=((3, 2.0), (9 + number, 4.0))),
        )
        for number, request in enumerate(requests)
    )


PLAIN = generations(SEED, 48)
CASES = {
    "plain": PLAIN,
    "choices": choices(PLAIN),
    "grammars": grammar_requests(SEED),
    "reasoning": reasoning_requests(SEED),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_in(tmp_path_factory.mktemp("model"))


@cache
def alone(model: Path, case: str) -> list[Answer]:
    return undisturbed(model, CASES[case])


def texts(requests: Requests, answers: list[Answer]) -> list[list[int]]:
    """Returns each prompt with its answer."""
    return [
        [*request.prompt, *(token for token, _ in answer[len(answer) - request.max_new_tokens :])]
        for request, answer in zip(requests, answers, strict=True)
    ]


@pytest.mark.promise
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("case", CASES)
async def test_requests_of_each_kind(model: Path, case: str, plan: str, tmp_path: Path) -> None:
    expected = await asyncio.to_thread(alone, model, case)
    async with recovering(config(model, tmp_path, plan=PLANS[plan])) as run:
        assert await asyncio.gather(*run.start(CASES[case])) == expected, f"seed {SEED}"
        again = await asyncio.gather(*run.start(CASES[case][:2]))
        assert again == expected[:2], "with their prompts in the prefix cache"


@pytest.mark.parametrize("plan", PLANS)
async def test_drafts_of_repetitions(model: Path, plan: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = await asyncio.to_thread(alone, model, "plain")
    windows = draft(texts(PLAIN, expected), Random(SEED), VOCABULARY, monkeypatch)
    async with recovering(config(model, tmp_path, plan=PLANS[plan])) as run:
        assert await asyncio.gather(*run.start(PLAIN)) == expected, f"seed {SEED}"
    assert windows.rows > 50


async def test_drafts_of_a_model(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = await asyncio.to_thread(alone, model, "plain")
    wait_for_any(Random(SEED), 8, monkeypatch)
    monkeypatch.setattr(model_drafts, "_CLOSE", MOST_ROWS)
    monkeypatch.setattr(speculation, "best_windows", AnyWindows(Random(SEED), 8))
    monkeypatch.setattr(NgramDrafters, "of", lambda self, key: SaidDrafters(lambda tokens, most: ()).of(key))
    settings = config(model, tmp_path, 2, plan=PLANS["one group"], speculative={"model": str(model)}, max_sequences=1)
    async with recovering(settings) as run:
        assert await asyncio.gather(*run.start(PLAIN)) == expected, f"seed {SEED}"
        assert run.cluster.engine.scheduler.drafts.accepted > 10


async def test_clients_that_leave_and_sequences_that_are_put_back(model: Path, tmp_path: Path) -> None:
    """The first requests are cancelled at their first token. The newest running sequence is preempted several times."""
    expected = await asyncio.to_thread(alone, model, "plain")
    async with recovering(config(model, tmp_path, plan=PLANS["a group and a worker"])) as run:
        engine, begun = run.cluster.engine, asyncio.Event()
        scheduler = engine.scheduler
        leaving = [asyncio.create_task(answer_of(engine.submit(request), begun.set)) for request in PLAIN[:3]]
        answering = run.start(PLAIN)
        await begun.wait()
        for task in leaving:
            task.cancel()
        for tokens in range(20, 200, 20):
            await run.token(tokens)
            if scheduler.queues.running:
                scheduler.queues.preempt(scheduler.queues.running[-1])
        assert await asyncio.gather(*answering) == expected, f"seed {SEED}"
        assert engine.counts.preemptions > 0
        await run.until("all KV blocks are free", lambda: engine.counts.kv_blocks_held == 0)


@pytest.mark.parametrize("architecture", ["gemma2", "gpt-oss", "qwen3moe", "deepseek2", "olmo2", "cohere2"])
async def test_kinds_of_models(architecture: str, tmp_path: Path) -> None:
    """The models have attention windows, sinks, mixtures of experts, latent attention, norms of whole rows, or parallel
    layers."""
    model = build_architecture(tmp_path / "model.gguf", architecture)
    requests = generations(SEED, 24, 60)
    expected = await asyncio.to_thread(undisturbed, model, requests)
    async with recovering(config(model, tmp_path, 2, plan=whole(model, (2, 1)), timeouts={"worker": "60s"})) as run:
        assert await asyncio.gather(*run.start(requests)) == expected, f"seed {SEED}"
        assert run.cluster.supervisor.recoveries == 0, run.told


async def test_models_that_sleep_and_wake(tmp_path: Path) -> None:
    """Two models on the same workers take turns. Only one is loaded at a time."""
    files = model_files(tmp_path)
    requests = PLAIN[:2]
    expected = [await asyncio.to_thread(undisturbed, file, requests) for file in files]
    keys = {"max_loaded_models": 1}
    async with models(files, tmp_path, tight=False, keys=keys, plan=whole(files[0], (1, 2))) as found:
        for turn in (0, 1, 0, 1):
            answers = await asyncio.gather(*(found.answer(turn, request) for request in requests))
            assert answers == expected[turn], f"seed {SEED}, model {turn}"
            assert found.states[turn] is AWAKE and found.states[1 - turn] is ASLEEP


async def test_models_side_by_side(tmp_path: Path) -> None:
    """The same workers form groups of two models at the same time."""
    files = model_files(tmp_path)
    expected = [await asyncio.to_thread(undisturbed, file, PLAIN) for file in files]
    async with models(files, tmp_path, tight=False, plan=whole(files[0], (1, 1))) as found:
        answering = [found.answer(model, request) for model in range(2) for request in PLAIN]
        assert await asyncio.gather(*answering) == [*expected[0], *expected[1]], f"seed {SEED}"
        assert found.states == [AWAKE, AWAKE] and found.most_models == 2


def whole(model: Path, shares: tuple[int, ...]) -> list[dict[str, object]]:
    """Returns the plan of a group that holds all layers."""
    with Model.open(model) as opened:
        layers = opened.layer_count
    return [{"workers": [*"abcde"[: len(shares)]], "layers": [0, layers], "shares": [*shares]}]

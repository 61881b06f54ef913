"""Tests of drafts of tokens that a grammar forces: tokens and logprob bits are those of steps without drafts."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from llamaclust.cluster.client.local import LocalClient
from llamaclust.cluster.launchers.in_process import LocalSettings
from llamaclust.cluster.scheduler.requests import GenerationRequest
from llamaclust.cluster.scheduler.speculation import speculation
from llamaclust.cluster.scheduler.speculation.candidates import Candidate
from llamaclust.cluster.scheduler.speculation.windows import RoundTimes
from llamaclust.core.sampler.params import SamplingParams
from llamaclust.model.grammars import definitions
from support.chat.constrained_requests import grammar_requests, reasoning_requests
from support.clusters.recovering import CONTEXT, Answer, answer_of, config, model_in, recovering, undisturbed
from support.models.tiny_architectures import build_architecture
from support.plans.drafting import AnyWindows
from support.seed import SEED

REQUESTS = tuple(
    replace(request, with_logprobs=True, top_logprobs=number % 4, request_id=f"{number}")
    for number, request in enumerate((*grammar_requests(SEED), *reasoning_requests(SEED)))
)
_NAMES = ("the_first_of_these_long_names", "and_another_one_of_these", "the_last_of_them")
_LONG_NAMES = definitions.of_schema(
    {
        "type": "object",
        "properties": {name: {"type": "integer", "minimum": 0, "maximum": 9} for name in _NAMES},
        "required": [*_NAMES],
        "additionalProperties": False,
    },
    "json_schema",
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_in(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def expected(model: Path) -> list[Answer]:
    return undisturbed(model, REQUESTS)


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> AnyWindows:
    monkeypatch.setattr(speculation, "best_windows", windows := AnyWindows(Random(SEED), 32))
    return windows


@pytest.mark.parametrize("workers", [1, 2, 3])
async def test_any_cut_gives_the_same_answers(
    model: Path, expected: list[Answer], windows: AnyWindows, workers: int, tmp_path: Path
) -> None:
    async with recovering(config(model, tmp_path, workers)) as run:
        assert await asyncio.gather(*run.start(REQUESTS)) == expected, f"seed {SEED}"
    assert windows.rows > 100


@pytest.mark.parametrize("victim", ["a", "c"])
async def test_a_lost_worker_changes_nothing(
    model: Path, expected: list[Answer], windows: AnyWindows, victim: str, tmp_path: Path
) -> None:
    async with recovering(config(model, tmp_path)) as run:
        answering = run.start(REQUESTS)
        await run.token(200)
        await run.until("a draft", lambda: any(s.drafting.forced for s in run.cluster.engine.scheduler.sequences))
        before = windows.rows
        run.hurt(victim)
        assert await asyncio.gather(*answering) == expected, f"seed {SEED}"
    assert windows.rows > before + 20


async def test_states_are_those_of_plain_steps(windows: AnyWindows, tmp_path: Path) -> None:
    model = build_architecture(tmp_path / "lfm2.gguf", "lfm2")
    expected = await asyncio.to_thread(undisturbed, model, REQUESTS)
    client = LocalClient(model, threads=1, settings=LocalSettings(CONTEXT))
    async with client._stage.serve() as service:
        answering = [answer_of(service._engine.submit(request)) for request in REQUESTS]
        assert await asyncio.gather(*answering) == expected, f"seed {SEED}"
    assert windows.rows > 50


def _whole(candidates: Sequence[Candidate], times: RoundTimes, groups: int, most_rows: int) -> list[int]:
    """Returns windows that include all drafted tokens, for one sequence."""
    return [min(len(each.tokens), most_rows) for each in candidates]


@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(temperature=0.8, repetition_penalty=1.3)])
async def test_forced_tokens_take_few_steps(
    model: Path, params: SamplingParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All drafted tokens are verified, whether this is faster or not."""
    request = GenerationRequest("r", tuple(range(3, 60)), 200, params, 5, grammar=_LONG_NAMES, with_logprobs=True)
    (expected,) = await asyncio.to_thread(undisturbed, model, [request])
    monkeypatch.setattr(speculation, "best_windows", _whole)
    client = LocalClient(model, threads=1, settings=LocalSettings(CONTEXT))
    async with client._stage.serve() as service:
        assert await answer_of(service._engine.submit(request)) == expected
        steps, drafts = service._engine.scheduler.in_flight._next_number, service._engine.scheduler.drafts
    assert len(expected) > 60 and steps < len(expected) / 3, f"{steps} steps for {len(expected)} tokens"
    assert drafts.accepted > len(expected) / 2

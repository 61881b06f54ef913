"""Tests of adapters in clusters: tokens and logprob bits are the same for any split, batch and lost worker, and greedy
ids are those of the merged model."""

from __future__ import annotations

import asyncio
import struct
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from llamaclust.cluster.config.cluster_config import ClusterConfig
from llamaclust.cluster.engine.engine import Engine
from llamaclust.cluster.scheduler.requests import GenerationRequest, PromptScored
from llamaclust.core.limits import AdapterScales
from llamaclust.core.sampler.params import SamplingParams
from llamaclust.core.sampler.results import RowResult
from llamaclust.model.quant_types import QuantType
from support.clusters.recovering import CONTEXT, Answer, config, recovering, undisturbed
from support.models.tiny_adapter import build_adapter, build_merged, build_peft
from support.models.tiny_model import build_tiny_model
from support.seed import SEED

_SEEDED = SamplingParams(temperature=0.9, top_k=40, repetition_penalty=1.1)
_ROUNDING = 0.02
"""Tolerance of logprobs, because keys and values are rounded to float16."""
_SCALES: tuple[AdapterScales, ...] = ((), ((0, 1.0),), ((0, 0.5),), ((1, 1.0),), ((0, 1.0), (1, -1.0)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Builds a model and two adapters."""
    folder = tmp_path_factory.mktemp("model")
    model = build_tiny_model(folder / "tiny.gguf", layers=6, context=CONTEXT, quant_type=QuantType.F32)
    build_adapter(folder / "first.gguf", model, rank=8)
    build_adapter(folder / "second.gguf", model, rank=3, parts=("attn_v", "ffn_down"), seed=2)
    return folder


def cluster_of(folder: Path, state_dir: Path, workers: int) -> ClusterConfig:
    adapters = [{"name": name, "path": str(folder / f"{name}.gguf")} for name in ("first", "second")]
    return config(folder / "tiny.gguf", state_dir, workers, adapters=adapters, timeouts={"worker": "60s"})


def requests(tokens: int = 90) -> tuple[GenerationRequest, ...]:
    """Returns a greedy and a seeded request for each choice of adapters. All prompts have the same prefix, and requests
    with the same choice share its KV blocks."""
    source = Random(SEED)
    shared = [source.randrange(3, 320) for _ in range(40)]
    return tuple(
        GenerationRequest(
            f"request {2 * i + is_seeded}",
            (*shared, *(source.randrange(3, 320) for _ in range(5 * i))),
            tokens,
            _SEEDED if is_seeded else SamplingParams(),
            seed=i,
            adapters=adapters,
        )
        for i, adapters in enumerate(_SCALES)
        for is_seeded in (False, True)
    )


@pytest.fixture(scope="module")
def expected(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Answer]:
    """Returns one worker's answers to requests that are sent one by one."""

    async def alone() -> list[Answer]:
        async with recovering(cluster_of(folder, tmp_path_factory.mktemp("alone"), 1)) as run:
            return [await run.start((request,))[0] for request in requests()]

    return asyncio.run(alone())


def test_each_choice_of_adapters_has_answers_of_its_own(folder: Path, expected: list[Answer]) -> None:
    assert len(set(expected)) == len(expected)
    plain = undisturbed(folder / "tiny.gguf", requests()[:2])
    assert expected[:2] == plain, "without adapters the answers are those of the model alone"


async def test_ids_are_those_of_the_merged_model(folder: Path, tmp_path: Path) -> None:
    """Greedy ids are equal, unless two tokens have equal probabilities within rounding."""
    async with recovering(cluster_of(folder, tmp_path, 2)) as run:
        for number, adapter in enumerate(("first", "second")):
            merged = build_merged(tmp_path / f"{adapter}.gguf", folder / "tiny.gguf", folder / f"{adapter}.gguf", 1.0)
            request = requests()[4 * number + 2]
            assert request.adapters == ((number, 1.0),)
            (answer,) = await asyncio.to_thread(undisturbed, merged, [replace(request, adapters=())])
            ids = tuple(token for token, _ in answer)
            scored = replace(request, prompt=(*request.prompt, *ids), max_new_tokens=0, top_logprobs=2)
            rows = await _scores(run.cluster.engine, replace(scored, score_from=len(request.prompt)))
            for (token, packed), row in zip(answer, rows, strict=True):
                (logprob,) = struct.unpack("<f", packed)
                assert row.token == token and row.logprob == pytest.approx(logprob, abs=_ROUNDING), f"seed {SEED}"
                assert row.top_logprobs[0][1] - row.logprob < _ROUNDING, "the merged model chooses it as well"


async def _scores(engine: Engine, request: GenerationRequest) -> list[RowResult]:
    return [row async for event in engine.submit(request) if isinstance(event, PromptScored) for row in event.rows]


@pytest.mark.parametrize("workers", [2, 3])
async def test_company_and_cuts_change_no_answer(
    folder: Path, expected: list[Answer], workers: int, tmp_path: Path
) -> None:
    async with recovering(cluster_of(folder, tmp_path, workers)) as run:
        assert await asyncio.gather(*run.start(requests())) == expected, f"seed {SEED}"
        again = await asyncio.gather(*run.start(requests()[3:6]))
        assert again == expected[3:6], "with their prompts in the prefix cache"


async def test_adapters_in_the_format_of_peft_give_the_same_answers(
    folder: Path, expected: list[Answer], tmp_path: Path
) -> None:
    """Each process reads the adapter folders itself."""
    adapters = [
        {"name": name, "path": str(build_peft(tmp_path / name, folder / "tiny.gguf", folder / f"{name}.gguf"))}
        for name in ("first", "second")
    ]
    async with recovering(config(folder / "tiny.gguf", tmp_path, 2, adapters=adapters)) as run:
        assert await asyncio.gather(*run.start(requests())) == expected, f"seed {SEED}"


@pytest.mark.promise
async def test_a_loss_in_the_middle_of_an_answer_changes_nothing(
    folder: Path, expected: list[Answer], tmp_path: Path
) -> None:
    async with recovering(cluster_of(folder, tmp_path, 3)) as run:
        answering = run.start(requests())
        await run.token(60)
        run.hurt("b")
        assert await asyncio.gather(*answering) == expected, f"seed {SEED}"

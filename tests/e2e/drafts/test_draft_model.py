"""Tests of draft models on real clusters: tokens and logprob bits are those of one worker without drafts."""

from __future__ import annotations

import asyncio
from pathlib import Path
from random import Random

import pytest

from llamaclust.cluster.client.local import LocalClient
from llamaclust.cluster.launchers.in_process import LocalSettings
from llamaclust.cluster.launchers.models.draft_model import LoadedDraftModel
from llamaclust.cluster.scheduler.drafting.ngram import NgramDrafters
from llamaclust.cluster.scheduler.speculation import model_drafts, speculation
from llamaclust.core.errors import UsageError
from llamaclust.worker.drafting.model_drafter import MOST_ROWS
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
from support.models.tiny_model import build_tiny_model
from support.plans.draft_models import wait_for_any
from support.plans.drafting import AnyWindows, SaidDrafters
from support.seed import SEED

REQUESTS = generations(SEED)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_in(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def expected(model: Path) -> list[Answer]:
    return undisturbed(model, REQUESTS)


@pytest.fixture(params=["itself", "another"])
def draft(model: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """Returns the path of a draft model: the model itself (all drafts are right), or another model (few are right)."""
    return model if request.param == "itself" else build_tiny_model(tmp_path / "other.gguf", layers=1, context=CONTEXT)


@pytest.mark.parametrize("workers", [1, 2, 3])
async def test_any_cut_gives_the_same_answers(
    model: Path, draft: Path, expected: list[Answer], workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wait_for_any(Random(SEED), 8, monkeypatch)
    # Otherwise answers may end before a busy machine has processed all prompts.
    monkeypatch.setattr(model_drafts, "_CLOSE", MOST_ROWS)
    monkeypatch.setattr(speculation, "best_windows", AnyWindows(Random(SEED), 8))
    monkeypatch.setattr(NgramDrafters, "of", lambda self, key: SaidDrafters(lambda tokens, most: ()).of(key))
    together = 8 if workers == 1 else 1  # With several microbatches in flight, a draft model is not used.
    settings = config(model, tmp_path, workers, speculative={"model": str(draft)}, max_sequences=together)
    async with recovering(settings) as run:
        for _ in range(10):  # On a busy machine, several microbatches may be in flight all the time.
            assert await asyncio.gather(*run.start(REQUESTS)) == expected, f"seed {SEED}"
            counts = run.cluster.engine.scheduler.drafts
            if counts.drafted > 20:
                break
    assert counts.drafted > 20
    assert counts.kinds == {"model": (counts.drafted, counts.accepted)}
    assert draft != model or counts.accepted > counts.drafted // 5


async def test_a_worker_that_is_lost_within_drafts_changes_nothing(
    model: Path, expected: list[Answer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wait_for_any(Random(SEED), 8, monkeypatch)
    async with recovering(config(model, tmp_path, speculative={"model": str(model)})) as run:
        answering = run.start(REQUESTS)
        await run.token(200)
        run.hurt("b")
        assert await asyncio.gather(*answering) == expected, f"seed {SEED}"


async def test_answers_go_on_when_the_draft_model_fails(
    model: Path, expected: list[Answer], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    wait_for_any(Random(SEED), 8, monkeypatch)
    drafting = LoadedDraftModel.draft
    asked = 0

    async def fails(self: LoadedDraftModel, orders: list[object]) -> object:
        nonlocal asked
        asked += 1
        if asked > 5:
            raise OSError("gone")
        return await drafting(self, orders)  # type: ignore[arg-type]

    monkeypatch.setattr(LoadedDraftModel, "draft", fails)
    client = LocalClient(model, threads=1, settings=LocalSettings(CONTEXT, draft_model=model))
    async with client._stage.serve() as service:
        for _ in range(10):  # A busy machine drafts less.
            answering = [answer_of(service._engine.submit(request)) for request in REQUESTS]
            assert await asyncio.gather(*answering) == expected, f"seed {SEED}"
            if asked > 5:
                break
    assert asked == 6
    assert "the draft model failed and is disabled: OSError('gone')" in caplog.text


def test_a_draft_model_without_speculation_is_refused(model: Path) -> None:
    with pytest.raises(UsageError, match="draft_model: drafting needs speculation, which is off"):
        LocalClient(model, settings=LocalSettings(speculation=False, draft_model=model))

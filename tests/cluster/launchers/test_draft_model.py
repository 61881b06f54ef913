"""Tests of draft models of a cluster: loaded once for all models with their tokens, and closed however a start ends."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest

from llamaclust.cluster.launchers.models import draft_model as module
from llamaclust.cluster.launchers.models.draft_model import (
    DraftModelPlan,
    LoadedDraftModel,
    SharedDraftModel,
    loaded_draft_model,
    open_draft_model,
    plan_draft_model,
)
from llamaclust.core.drafts import DraftOrder, DraftReplies
from llamaclust.core.errors import InsufficientMemoryError, UsageError
from llamaclust.core.sampler.params import SamplingParams
from llamaclust.core.sampler.tasks import SampleTask
from llamaclust.model.loader import Model
from llamaclust.worker.devices.devices import Device
from support.models.tiny_model import build_tiny_model

CONTEXT = 64
TASK = SampleTask(SamplingParams(), 0, 0, 0)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("model") / "tiny.gguf", layers=1, hidden=64, ffn=64, heads=4)


@pytest.fixture
def plan(path: Path) -> DraftModelPlan:
    with Model.open(path) as target:
        return plan_draft_model(path, [target], 1, CONTEXT)


async def test_a_start_that_ends_while_it_loads_leaves_nothing(
    plan: DraftModelPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_loading, may_load, closed = threading.Event(), threading.Event(), threading.Event()

    def slowly(plan: DraftModelPlan) -> LoadedDraftModel:
        is_loading.set()
        may_load.wait(60)
        return open_draft_model(plan)

    def close(self: LoadedDraftModel) -> None:
        closing(self)
        closed.set()

    closing = LoadedDraftModel.close
    monkeypatch.setattr(module, "open_draft_model", slowly)
    monkeypatch.setattr(LoadedDraftModel, "close", close)

    async def start() -> None:
        async with loaded_draft_model(plan):
            raise AssertionError("it was cancelled")

    starting = asyncio.create_task(start())
    assert await asyncio.to_thread(is_loading.wait, 60)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert not closed.is_set()
    may_load.set()
    assert await asyncio.to_thread(closed.wait, 60)


async def test_it_is_closed_beside_the_event_loop(plan: DraftModelPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    """Closing waits for a draft in progress without blocking the event loop."""
    loop, closing = asyncio.get_running_loop(), LoadedDraftModel.close
    has_gone_on = threading.Event()

    def close(self: LoadedDraftModel) -> None:
        loop.call_soon_threadsafe(has_gone_on.set)
        assert has_gone_on.wait(60), "the loop waits for it"
        closing(self)

    monkeypatch.setattr(LoadedDraftModel, "close", close)
    async with loaded_draft_model(plan) as model:
        replies = await model.draft([DraftOrder(1, [3, 4, 5], 3, 4, TASK)])
    assert [len(reply.tokens) for reply in replies.replies] == [4]


async def test_too_little_memory_is_said_before_it_is_loaded(
    plan: DraftModelPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Device, "free_bytes_of", lambda self, name: plan.memory.total_bytes - 1)
    with pytest.raises(InsufficientMemoryError, match=r"draft model .*tiny.gguf needs .*: 1 MiB are missing"):
        async with loaded_draft_model(plan):
            raise AssertionError("it does not fit")


def test_it_takes_what_was_planned(plan: DraftModelPlan) -> None:
    with open_draft_model(plan) as model:
        assert model.memory_bytes == plan.memory.total_bytes


def test_it_drafts_for_those_of_several_models_that_have_its_tokens(path: Path, tmp_path: Path) -> None:
    small = partial(build_tiny_model, layers=1, hidden=64, ffn=64, heads=4)
    padded = small(tmp_path / "padded.gguf", vocabulary=320 + 64)
    other = small(tmp_path / "other.gguf", vocabulary=1024)
    with Model.open(path) as own, Model.open(padded) as like, Model.open(other) as unlike:
        assert plan_draft_model(path, [unlike, own, like], 1, CONTEXT).targets == (1, 2)
        told = r"its 320 tokens differ from the 1024 tokens of .*other.gguf; name a model of the same family"
        with pytest.raises(UsageError, match=told):
            plan_draft_model(path, [unlike, unlike], 1, CONTEXT)


async def test_models_that_share_it_have_sequences_of_their_own(plan: DraftModelPlan) -> None:
    """The same key names another sequence in each model, with keys and values of its own."""
    first, second = [3, 4, 5] * 8, [9, 8, 7] * 8
    with open_draft_model(plan) as model:
        shares = [SharedDraftModel(model, number, 2) for number in range(2)]

        async def draft(number: int, tokens: Sequence[int]) -> DraftReplies:
            return await shares[number].draft([DraftOrder(5, tokens, len(tokens), 4, TASK)])

        before = [await draft(0, first), await draft(1, second)]
        assert [reply.key for replies in before for reply in replies.replies] == [5, 5]
        assert len(model._drafter._caches._caches) == 2 + 2, "of both, and those of the trial"
        again = [await draft(0, first), await draft(1, second)]
        assert [replies.replies for replies in again] == [replies.replies for replies in before]
        shares[0].lose()
        assert shares[1].is_lost and model.is_lost

"""Tests of MTP heads on real clusters: tokens and logprob bits are those of one worker without drafts."""

from __future__ import annotations

import asyncio
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import pytest

from llamaclust.cluster.client.local import LocalClient
from llamaclust.cluster.launchers.in_process import LocalSettings
from llamaclust.cluster.scheduler.drafting.ngram import NgramDrafters
from llamaclust.cluster.scheduler.speculation import speculation
from llamaclust.cluster.scheduler.speculation.costs import MeasuredRounds
from llamaclust.cluster.scheduler.speculation.mtp_times import MtpTimes
from llamaclust.core.errors import UsageError
from llamaclust.kernels.backend import Backend
from llamaclust.kernels.cpu.backend import CpuBackend
from llamaclust.kernels.reference.backend import ReferenceBackend
from llamaclust.model.loader import Model
from llamaclust.model.nextn.program import FAMILIES
from support.arithmetic import disturbed
from support.clusters.recovering import CONTEXT, Answer, answer_of, config, generations, recovering, undisturbed
from support.models.tiny.nextn_models import with_nextn, with_right_nextn
from support.models.tiny_architectures import build_architecture
from support.plans.drafting import AnyWindows, SaidDrafters
from support.plans.mtp import order_any
from support.seed import SEED

REQUESTS = generations(SEED)
MTP: dict[str, Any] = {"speculative": {"mtp": True}}


@cache
def _model(folder: Path, name: str, *, knows: bool) -> Path:
    build = with_right_nextn if knows else with_nextn
    return build(folder / f"{name}-{knows}.gguf", name)


@cache
def _expected(model: Path) -> list[Answer]:
    return undisturbed(model, REQUESTS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Disables n-gram drafts."""
    monkeypatch.setattr(NgramDrafters, "of", lambda self, key: SaidDrafters(lambda tokens, most: ()).of(key))


def _draft_any(monkeypatch: pytest.MonkeyPatch, most: int = 6) -> None:
    """Drafts with the MTP head and verifies windows of random size, whether this is faster or not."""
    order_any(Random(SEED), most, monkeypatch)
    monkeypatch.setattr(speculation, "best_windows", AnyWindows(Random(SEED), most))


@pytest.mark.parametrize("workers", [1, 2, 3])
async def test_any_cut_gives_the_same_answers(
    folder: Path, workers: int, alone: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _draft_any(monkeypatch)
    name = FAMILIES[workers]
    for knows in (True, False):
        model = _model(folder, name, knows=knows)
        expected = await asyncio.to_thread(_expected, model)
        async with recovering(config(model, tmp_path, workers, **MTP)) as run:
            assert await asyncio.gather(*run.start(REQUESTS)) == expected, f"seed {SEED}"
            counts = run.cluster.engine.scheduler.drafts
        assert counts.drafted > 50
        assert counts.accepted > counts.drafted // 3 if knows else counts.accepted < counts.drafted // 3


@pytest.mark.parametrize("victim", ["a", "b", "c"])
async def test_a_lost_worker_changes_nothing(
    folder: Path, victim: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _draft_any(monkeypatch)
    model = _model(folder, "glm4moe", knows=False)
    expected = await asyncio.to_thread(_expected, model)
    async with recovering(config(model, tmp_path, **MTP)) as run:
        answering = run.start(REQUESTS)
        await run.token(200)
        run.hurt(victim)
        assert await asyncio.gather(*answering) == expected, f"seed {SEED}"


@pytest.mark.parametrize("name", ["deepseek2", "glm4moe"])
async def test_preemptions_aborts_and_prefix_hits_change_nothing(
    folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _draft_any(monkeypatch)
    model = _model(folder, name, knows=False)
    expected = await asyncio.to_thread(_expected, model)
    client = LocalClient(model, threads=1, settings=LocalSettings(CONTEXT, kv_blocks=40, mtp=True))
    async with client._stage.serve() as service:
        engine, begun = service._engine, asyncio.Event()
        leaving = [asyncio.create_task(answer_of(engine.submit(request), begun.set)) for request in REQUESTS[:3]]
        answering = [asyncio.create_task(answer_of(engine.submit(request))) for request in REQUESTS]
        async with asyncio.timeout(60):
            await begun.wait()
        for task in leaving:
            task.cancel()
        assert await asyncio.gather(*answering) == expected, f"seed {SEED}"
        again = [answer_of(engine.submit(request)) for request in REQUESTS[:7]]
        assert await asyncio.gather(*again) == expected[:7], f"seed {SEED}"
        assert engine.counts.preemptions > 0 and engine.counts.cached_tokens > 0
        assert engine.counts.kv_blocks_held == 0


@pytest.mark.parametrize(
    ("knows", "backend"),
    [(True, CpuBackend(1)), (False, CpuBackend(1)), (False, ReferenceBackend())],
    ids=["right", "wrong", "reference"],
)
@pytest.mark.parametrize("name", FAMILIES)
def test_disturbances_change_no_bit(folder: Path, name: str, knows: bool, backend: Backend) -> None:
    model = _model(folder, name, knows=knows)
    with Model.open(model) as opened:
        known = disturbed.undisturbed(backend, opened, 256)
        assert disturbed.disturbed(backend, opened, 256, known, mtp=True) == known


@pytest.fixture
def bandwidth_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces the scheduler's measured times: rows and drafts take little time compared with a step."""
    monkeypatch.setattr(MeasuredRounds, "plain_ns", lambda self, sequences, groups: 1e6)
    monkeypatch.setattr(MeasuredRounds, "window_ns", lambda self, rows, groups: 1e6 + 1e4 * rows)
    monkeypatch.setattr(MtpTimes, "draft_ns", lambda self, sequences, tokens: 1e4 * tokens)


async def test_a_head_that_is_right_is_asked_and_believed(folder: Path, alone: None, bandwidth_bound: None) -> None:
    """The MTP head predicts all greedy tokens of this model."""
    model = _model(folder, "glm4moe", knows=True)
    expected = await asyncio.to_thread(_expected, model)
    client = LocalClient(model, threads=1, settings=LocalSettings(CONTEXT, mtp=True))
    async with client._stage.serve() as service:
        assert await answer_of(service._engine.submit(REQUESTS[0])) == expected[0]
        counts = service._engine.scheduler.drafts
    assert counts.accepted > counts.drafted // 2 > 0


async def test_a_head_that_is_wrong_is_not_asked_for_long(folder: Path, alone: None, bandwidth_bound: None) -> None:
    model = _model(folder, "glm4moe", knows=False)
    expected = await asyncio.to_thread(_expected, model)
    client = LocalClient(model, threads=1, settings=LocalSettings(CONTEXT, mtp=True))
    async with client._stage.serve() as service:
        found = [await answer_of(service._engine.submit(request)) for request in REQUESTS]
        assert found == expected
        counts = service._engine.scheduler.drafts
    assert counts.drafted < sum(map(len, expected)) // 4


def test_a_model_without_a_head_is_refused(tmp_path: Path) -> None:
    model = build_architecture(tmp_path / "model.gguf", "glm4moe")
    with pytest.raises(UsageError, match="has no head for multi-token prediction"):
        LocalClient(model, settings=LocalSettings(CONTEXT, mtp=True))


def test_a_head_without_speculation_is_refused(folder: Path) -> None:
    model = _model(folder, "glm4moe", knows=True)
    with pytest.raises(UsageError, match="mtp: drafting needs speculation, which is off"):
        LocalClient(model, settings=LocalSettings(CONTEXT, mtp=True, speculation=False))

"""Fixtures of clusters that recover: a model, requests, and their answers in an undisturbed run."""

from __future__ import annotations

from pathlib import Path

import pytest

from llamaclust.cluster.engine import retirement
from llamaclust.cluster.scheduler.requests import GenerationRequest
from support.clusters.recovering import Answer, generations, model_in, undisturbed
from support.seed import SEED


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_in(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def requests(request: pytest.FixtureRequest) -> tuple[GenerationRequest, ...]:
    """Returns requests for the module's TOKENS tokens each, in MIXES mixes, by default one."""
    print(f"seed {SEED}")
    mixes, tokens = getattr(request.module, "MIXES", 1), request.module.TOKENS
    return tuple(generation for mix in range(mixes) for generation in generations(SEED + mix, tokens))


@pytest.fixture(scope="module")
def expected(model: Path, requests: tuple[GenerationRequest, ...]) -> list[Answer]:
    return undisturbed(model, requests)


@pytest.fixture
def staying(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps all sequences on the old epoch to their end: none is copied."""
    monkeypatch.setattr(retirement, "_LEAST_LEFT", 1_000_000)

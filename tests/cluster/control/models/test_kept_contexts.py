"""Tests that a cluster keeps a context length chosen by memory when it loses a worker, and all answers with it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from random import Random
from typing import Any

import pytest

from llamaclust.cluster.launchers.local import LocalLauncher
from support.clusters.recovering import Answer, config, generations, recovering, undisturbed
from support.models.tiny_model import build_tiny_model
from support.seed import SEED

TOKENS = 100
_TRAINED = 1 << 20
_SPEED = {"threads": 1, "memory_bandwidth_gb_s": 20.0, "int8_gmac_s": 300.0}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("model") / "tiny.gguf", layers=6, context=_TRAINED)


@pytest.fixture(scope="module")
def expected(model: Path) -> list[Answer]:
    return undisturbed(model, generations(SEED, TOKENS))


@pytest.mark.parametrize("memory", ["96MiB", "128MiB", "192MiB"])
async def test_a_lost_worker_changes_neither_the_context_nor_an_answer(
    memory: str, model: Path, expected: list[Answer], tmp_path: Path
) -> None:
    print(f"seed {SEED}")
    source, requests = Random(SEED), generations(SEED, TOKENS)
    workers: list[dict[str, Any]] = [{"name": name, "memory": memory, **_SPEED} for name in "ab"]
    async with recovering(config(model, tmp_path, workers=workers, context_length="auto")) as run:
        plan = run.cluster.supervisor.epoch.plan
        assert 4096 < plan.context_length < _TRAINED and not plan.lacks_kv_memory
        assert isinstance(run.cluster.launcher, LocalLauncher)
        may_begin, victim = run.cluster.launcher._restarts._begun, source.choice("ab")
        tasks = run.start(requests)
        await run.token(source.randrange(1, len(requests) * TOKENS // 2))
        may_begin.clear()  # The other worker computes alone until the requests end.
        run.hurt(victim)
        assert await asyncio.gather(*tasks) == expected
        alone = run.cluster.supervisor.epoch.plan
        assert alone.context_length == plan.context_length and len(alone.stages) == 1
        is_told = any(f"of the context's {plan.context_length} tokens" in text for text in run.told)
        assert is_told == alone.lacks_kv_memory
        may_begin.set()
        await run.whole()
        again = run.cluster.supervisor.epoch.plan
        assert again.context_length == plan.context_length and not again.lacks_kv_memory
        assert await asyncio.gather(*run.start(requests)) == expected

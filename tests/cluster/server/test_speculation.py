"""Whether pipelines draft tokens, as the cluster file says."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from llamaclust.cluster.config.cluster_config import ClusterConfig
from llamaclust.cluster.control.limits import speculation_settings
from llamaclust.cluster.scheduler.drafting.ngram import NgramDrafters
from llamaclust.cluster.scheduler.drafting.shared import SharedDrafters
from llamaclust.cluster.scheduler.prefix_cache import BlockKeys
from llamaclust.cluster.scheduler.requests import GenerationRequest
from llamaclust.core.sampling import SamplingParams
from support.clusters.recovering import answer_of, config, model_in, recovering


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_in(tmp_path_factory.mktemp("model"))


def _config(**keys: object) -> ClusterConfig:
    return ClusterConfig.model_validate({"model": "m.gguf", "workers": [{"name": "a"}], **keys})


def test_the_cluster_file_chooses_drafters_and_window() -> None:
    plain, shared = speculation_settings(_config(), None), {"max_window": 7, "shared_answers": 4096}
    assert plain is not None and isinstance(plain.drafters, NgramDrafters) and plain.max_window == 32
    known = speculation_settings(_config(speculative=shared), None)
    assert known is not None and isinstance(known.drafters, SharedDrafters) and known.max_window == 7
    assert speculation_settings(_config(speculative="off"), None) is None


async def test_shared_answers_outlive_pipelines(model: Path, tmp_path: Path) -> None:
    settings = config(model, tmp_path, speculative={"max_window": 7, "shared_answers": 4096})
    request = GenerationRequest("r", tuple(range(3, 40)), 40, SamplingParams(temperature=0.9), seed=1)
    async with recovering(settings) as run:
        engine = run.cluster.engine
        before, epoch = engine.scheduler.settings.speculation, run.cluster.supervisor.epoch.number
        assert before is not None
        answer = await answer_of(engine.submit(request))
        run.hurt("b")
        await run.until("the loss", lambda: any("is lost" in text for text in run.told))
        assert await answer_of(engine.submit(request)) == answer
        await run.until("another epoch", lambda: run.cluster.supervisor.epoch.number > epoch)
        assert engine.scheduler.settings.speculation is before
        tokens = [*request.prompt, *(token for token, _ in answer)]
        drafted = before.drafters.of(BlockKeys().salt).draft(tokens[:50], 7)
        assert drafted.tokens == tuple(tokens[50:57])


async def test_a_cluster_file_turns_speculation_off(model: Path, tmp_path: Path) -> None:
    async with recovering(config(model, tmp_path, 2, speculative="off")) as run:
        assert run.cluster.engine.scheduler.settings.speculation is None
        await asyncio.gather(*run.start([GenerationRequest("r", (5, 6, 7) * 9, 30)]))

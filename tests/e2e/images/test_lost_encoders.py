"""Tests of an image encoder that fits no worker after a loss: text requests continue, and images are refused until
there is enough memory again."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from llamaclust.cluster.control import planning
from llamaclust.cluster.engine.engine import EngineState
from llamaclust.cluster.launchers.local import LocalLauncher
from llamaclust.core.errors import WorkerError
from support.clusters.recovering import answer_of, config, generations, recovering, undisturbed
from support.models.vision.served_tiles import check_rows, encode, random_tiles, seeing_model
from support.seed import SEED

ROOM = 19 << 20
"""The memory of a worker in bytes. One worker can hold all layers without the encoder, and two can hold both."""


def small_memory(_: object, resources: planning.ClusterResources) -> dict[str, int]:
    return dict.fromkeys(resources.workers, ROOM)


@pytest.mark.parametrize("is_chosen", [True, False])
async def test_text_goes_on_without_the_encoder_until_a_worker_is_back(
    is_chosen: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "_memory_shares", small_memory)
    (model, path), tiles, requests = seeing_model(tmp_path, layers=6), random_tiles(), generations(SEED, tokens=60)
    expected = await asyncio.to_thread(undisturbed, model, requests)
    chosen = {"mmproj": str(path)} if is_chosen else {}
    async with recovering(config(model, tmp_path, workers=2, timeouts={"worker": "60s"}, **chosen)) as run:
        engine, launcher = run.cluster.engine, run.cluster.launcher
        assert isinstance(launcher, LocalLauncher)
        assert engine.encoder is not None
        check_rows(path, tiles, await encode(engine.encoder, tiles))
        may_restart = launcher._restarts._begun
        answering = run.start(requests)
        await run.token(20)
        may_restart.clear()  # If worker b restarted before the next plan, the encoder would fit.
        run.hurt("b")
        await run.until("the loss", lambda: engine.state is EngineState.RECOVERING)
        with pytest.raises(WorkerError) as refused:
            await encode(engine.encoder, tiles)
        text = str(refused.value)
        assert text.startswith("images are refused until a worker has room for their encoder: the encoder of images")
        assert "Give one of them more memory" in text and "\n" not in text and text in run.told
        assert await asyncio.gather(*answering) == expected
        assert run.cluster.supervisor.recoveries == 1 and not run.cluster.plan.has_encoder
        may_restart.set()
        await run.until("images", lambda: "images are accepted again" in run.told)
        check_rows(path, tiles, await encode(engine.encoder, tiles))
        assert await answer_of(engine.submit(requests[0])) == expected[0]

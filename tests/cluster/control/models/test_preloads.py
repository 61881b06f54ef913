"""Checks that preloads end with the real engine, on the store of a supervisor that observes nothing more."""

from __future__ import annotations

import asyncio

import pytest

from llamaclust.cluster.control.model_lifecycle import ModelLifecycle
from llamaclust.cluster.engine.engine import Engine
from llamaclust.cluster.engine.pipeline import NoPipeline
from llamaclust.cluster.membership.members import Members
from llamaclust.core.errors import ClusterStoppingError, LlamaclustError, WorkerError
from support.clusters.served import SETTINGS
from support.several_models.runner import supervised


@pytest.mark.parametrize("error", [LlamaclustError("no plan is left"), ClusterStoppingError("the cluster is stopping")])
async def test_a_preload_ends_when_the_engine_is_shut_down(error: LlamaclustError) -> None:
    pool, supervisor = supervised(Members(lambda *_: ""))
    async with asyncio.timeout(20), Engine(NoPipeline(), SETTINGS, owner=supervisor) as engine:
        lifecycle = ModelLifecycle("a", supervisor.store, engine, None)
        preloading = asyncio.create_task(lifecycle.preload())
        await asyncio.sleep(0)
        assert not (preloading.done() or lifecycle.is_idle)
        engine.shut_down(error)
        with pytest.raises(WorkerError, match=str(error)):
            await preloading
        assert lifecycle.is_idle
    await supervisor.aclose()
    await pool.aclose()

"""Checks that a plan that fills the workers' memory loads: memory of measurements is returned or counted."""

from __future__ import annotations

from pathlib import Path

import pytest

from llamaclust.cluster.config.cluster_config import load_config
from llamaclust.cluster.server.coordinator import open_cluster
from llamaclust.cluster.state.directory import ClusterDir
from llamaclust.cluster.state.events import Event, Measuring, PlanMade
from llamaclust.core.sizes import MIB
from support.clusters.recovering import Answer, answer_of, generations, undisturbed
from support.models.tiny_model import build_tiny_model

MEMORY = 400 * MIB
REQUESTS = generations(1, 8)[:2]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("model") / "m.gguf", layers=6, context=512)


@pytest.fixture(scope="module")
def expected(model: Path) -> list[Answer]:
    return undisturbed(model, REQUESTS)


async def test_what_was_planned_to_fill_all_memory_loads_at_once(
    model: Path, expected: list[Answer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """KV memory takes all that is left. The second start knows the profiles, and measures nothing."""
    monkeypatch.setenv("LLAMACLUST_HOME", str(tmp_path / "home"))
    directory = ClusterDir(tmp_path / "full")
    directory.create()
    each = f"threads: 1, memory: {MEMORY // MIB}MiB"
    keys = [f"model={model}", f"workers=[{{name: a, {each}}}, {{name: b, {each}}}]", "kv_memory=4GiB"]
    keys += [f"state_dir={tmp_path}", "plan=[{worker: a, layers: [0, 3]}, {worker: b, layers: [3, 6]}]"]
    found: list[Answer] = []
    for is_measured in (False, True):
        events: list[Event] = []
        async with open_cluster(load_config(None, keys), [model], directory, events.append) as cluster:
            taken = [stage.bytes for stage in cluster.plan.stages]
            assert max(taken) > MEMORY * 3 // 4, "it fills the memory of one"
            found += [await answer_of(cluster.engine.submit(request)) for request in REQUESTS]
        assert sum(isinstance(event, PlanMade) for event in events) == 1, "no load was refused"
        assert any(isinstance(event, Measuring) for event in events) != is_measured
    assert found == 2 * expected

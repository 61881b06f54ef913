"""Checks that plans, `model info` and loaded stages name the same memory, and that no model that fits is refused."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import pytest

from llamaclust.cluster.config.cluster_config import ClusterConfig
from llamaclust.cluster.control.limits import plan_limits
from llamaclust.cluster.control.planning import ClusterResources, plan_cluster
from llamaclust.cluster.control.resources.resource_shares import WorkerResources
from llamaclust.cluster.planner.plan import Plan
from llamaclust.core.errors import InsufficientMemoryError
from llamaclust.core.sizes import MIB
from llamaclust.kernels.cpu.backend import CpuBackend
from llamaclust.model.loader import Model
from llamaclust.model.program import KV_BLOCK_TOKENS
from llamaclust.model.quant_types import QuantType
from llamaclust.tools.model_fit import fit
from llamaclust.worker.stage.stage_runner import StageRunner
from support.models.tiny_architectures import build_architecture
from support.models.tiny_model import build_tiny_model

TINY: Mapping[str, Mapping[str, object]] = {
    "tied": {"tied": True},
    "untied": {},
    "tied, many words": {"tied": True, "vocabulary": 60_000, "quant_type": QuantType.Q8_0},
    "tied, of two types": {"tied": True, "quant_type": QuantType.Q4_K, "other_types": {"token_embd": QuantType.Q6_K}},
    "a mixture": {"experts": 4},
    "a tied mixture": {"experts": 4, "tied": True},
}
ARCHITECTURES = ("gemma3", "qwen3", "gpt-oss", "lfm2")
ROOM = 1 << 40


@pytest.fixture(scope="module", params=[*TINY, *ARCHITECTURES])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("model") / "m.gguf"
    if request.param in ARCHITECTURES:
        return build_architecture(file, request.param)
    return build_tiny_model(file, layers=4, **TINY[request.param])  # type: ignore[arg-type]


def planned(path: Path, model: Model, workers: int, room: int = ROOM) -> tuple[ClusterConfig, Plan]:
    names = [f"w{number}" for number in range(workers)]
    middle = model.layer_count // workers
    cuts = [*(number * middle for number in range(workers)), model.layer_count]
    plan = [{"worker": name, "layers": [*cut]} for name, cut in zip(names, pairwise(cuts), strict=True)]
    values = {"model": str(path), "workers": [{"name": name} for name in names], "plan": plan}
    config = ClusterConfig.model_validate(values)
    resources = ClusterResources({name: WorkerResources("m", room, threads=2) for name in names}, {})
    return config, plan_cluster(config, model, resources)


@pytest.mark.parametrize("workers", [1, 2])
def test_plans_are_what_stages_take(path: Path, workers: int) -> None:
    with Model.open(path) as model:
        config, plan = planned(path, model, workers)
        for stage in plan.stages:
            runner = StageRunner(CpuBackend(2), model, stage.start, stage.end, plan_limits(config, plan))
            memory = runner.memory
            runner.close()
            told = stage.weight_bytes, stage.kv_bytes, stage.workspace_bytes
            assert told[:2] == (memory.weight_bytes, memory.kv_bytes)
            assert 0 <= told[2] - memory.workspace_bytes < MIB  # other layers may need a little more
        if workers == 1:
            assert fit(path, ROOM, 2).total_bytes == memory.total_bytes


def test_what_fits_to_the_byte_is_not_refused(path: Path) -> None:
    least = fit(path, ROOM, 2).least_bytes
    with Model.open(path) as model:
        planned(path, model, 1, least)
        with pytest.raises(InsufficientMemoryError, match="1 MiB"):
            planned(path, model, 1, least - 1)


@pytest.mark.parametrize(
    ("keys", "tokens"),
    [
        ({}, 16_384),
        ({"context_length": 4096}, 8192),
        ({"context_length": 12_288}, 12_288),
        ({"max_sequences": 5}, 20_480),
        ({"max_sequences": 5, "context_length": 8192}, 40_960),
        ({"max_sequences": 1}, 16_384),
    ],
    ids=str,
)
def test_kv_memory_is_for_one_or_two_users_unless_their_number_is_given(
    tmp_path: Path, keys: dict[str, int], tokens: int
) -> None:
    path = build_tiny_model(tmp_path / "m.gguf", layers=2, context=16_384)
    config = ClusterConfig.model_validate({"model": str(path), "workers": [{"name": "a"}]} | keys)
    with Model.open(path) as model:
        plan = plan_cluster(config, model, ClusterResources({"a": WorkerResources("m", ROOM, threads=1)}, {}))
    assert plan.kv_blocks * KV_BLOCK_TOKENS == tokens

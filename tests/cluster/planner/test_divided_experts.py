"""Tests of plans for machines too small for a layer: its experts are divided, or the plan is refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from random import Random

import pytest

from llamaclust.cluster.config.cluster_config import ClusterConfig
from llamaclust.cluster.control.limits import check_plan, plan_limits
from llamaclust.cluster.control.planning import ClusterResources, plan_cluster
from llamaclust.cluster.control.resources.resource_shares import WorkerResources
from llamaclust.cluster.control.stage_memory import workspace_of
from llamaclust.cluster.planner.format import plan_json, plan_lines
from llamaclust.cluster.planner.memory import StagePlace
from llamaclust.cluster.planner.plan import Plan
from llamaclust.core.errors import InsufficientMemoryError, UsageError
from llamaclust.core.limits import StageLimits
from llamaclust.kernels.cpu.backend import CpuBackend
from llamaclust.model.kv_type import KvType
from llamaclust.model.loader import Model
from llamaclust.worker.devices.workspace import planned_workspace_bytes
from llamaclust.worker.stage.stage_runner import StageRunner
from support.models.tiny_architectures import build_architecture
from support.models.tiny_model import build_tiny_model
from support.seed import SEED

MIB = 1 << 20


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """Opens a model of two layers, of 48 MiB of experts each."""
    folder = tmp_path_factory.mktemp("divided")
    return Model.open(build_tiny_model(folder / "moe.gguf", layers=2, experts=64, ffn=512))


def config(workers: int, **values: object) -> ClusterConfig:
    names = [{"name": name, "threads": 1} for name in "abcdefgh"[:workers]]
    base: Mapping[str, object] = {"model": "m.gguf", "workers": names, "context_length": 64, "max_sequences": 1}
    return ClusterConfig.model_validate({**base, **values})


def planned(model: Model, settings: ClusterConfig, memory_bytes: int) -> Plan:
    """Plans workers with `memory_bytes` each."""
    one = WorkerResources(threads=1, free_memory_bytes=memory_bytes, machine="", machine_free_bytes=0)
    machines = {worker.name: replace(one, machine=worker.name) for worker in settings.workers}
    return plan_cluster(settings, model, ClusterResources(machines, {}))


def least_whole(model: Model, settings: ClusterConfig) -> int:
    """Returns the least memory of each worker that a plan of whole layers fits in."""
    low, high = 1, 1 << 30
    while high - low > MIB // 16:
        middle = (low + high) // 2
        try:
            fits = planned(model, settings, middle).expert_shards == 1
        except InsufficientMemoryError:
            fits = False
        low, high = (low, middle) if fits else (middle, high)
    return high


def test_layers_are_divided_only_where_whole_ones_do_not_fit(model: Model) -> None:
    settings = config(6)
    least = least_whole(model, settings)
    whole, divided = planned(model, settings, least), planned(model, settings, least - 3 * MIB)
    assert whole.expert_shards == 1 and divided.expert_shards > 1
    assert all(stage.bytes <= least - 3 * MIB for stage in divided.stages)
    bounds = [(stage.start, stage.end) for stage in divided.stages]
    assert bounds[0][0] == 0 and bounds[-1][1] == 2 * divided.expert_shards
    assert [end for _, end in bounds[:-1]] == [start for start, _ in bounds[1:]]
    inside = [end / divided.expert_shards for _, end in bounds if end % divided.expert_shards]
    assert inside, "a stage ends inside a layer"
    assert f"layers [0, {bounds[0][1] / divided.expert_shards:g})" in "\n".join(plan_lines(divided))
    stages = plan_json(divided)["stages"]
    assert {stage["end"] for stage in stages} >= set(inside) and stages[-1]["end"] == 2


def test_stages_take_what_was_planned(model: Model) -> None:
    settings = config(6)
    plan = planned(model, settings, least_whole(model, settings) - MIB)
    backend, limits = CpuBackend(1), plan_limits(settings, plan)
    for stage in plan.stages:
        runner = StageRunner(backend, model, stage.start, stage.end, limits)
        assert runner.memory.weight_bytes == stage.weight_bytes and runner.memory.kv_bytes == stage.kv_bytes
        assert runner.memory.workspace_bytes <= stage.workspace_bytes
        runner.close()


@pytest.mark.parametrize("name", ["gpt-oss", "qwen2moe", "glm4moe"])
def test_costs_of_all_cuts_are_what_stages_hold(tmp_path: Path, name: str) -> None:
    """Costs are exact to the byte, even for biases, which take fewer tiles in a whole layer than in its parts."""
    from llamaclust.cluster.planner.costs import StageCosts

    opened, shards = Model.open(build_architecture(tmp_path / f"{name}.gguf", name)), 3
    stages = StageCosts.of(opened.costs(KvType.F16, shards))
    assert stages.layers == opened.layer_count * shards
    for start in range(stages.layers):
        for end in range(start + 1, stages.layers + 1):
            if stages.possible[start, end]:
                tensors = opened.tensors_for(opened.program(start, end, expert_shards=shards))
                assert stages.weight_bytes(start, end) == sum(t.resident_bytes for t in tensors.values()), (start, end)


@pytest.mark.parametrize("name", ["llama-experts", "gpt-oss", "glm4moe", "nemotron_h_moe", "llama4"])
@pytest.mark.parametrize("shards", [2, 4])
def test_no_stage_takes_more_than_planned(tmp_path: Path, name: str, shards: int) -> None:
    """Checks this for all starts and ends of a stage, and that one stage takes exactly as much."""
    model, rows = Model.open(build_architecture(tmp_path / f"{name}.gguf", name)), Random(SEED).randint(64, 512)
    limits = StageLimits(rows, 16, 8, 1024, 300, expert_shards=shards)
    costs, workspace = model.costs(KvType.F16, shards), workspace_of(model, limits)
    shares = []
    for start, end in combinations(costs.borders, 2):
        promised = workspace(StagePlace(2, 1024, end == len(costs.layers)))
        shares.append(planned_workspace_bytes(model, start, end, limits, 2) / promised)
    assert max(shares) == 1.0, SEED


def test_the_error_is_that_of_whole_layers_where_nothing_fits(model: Model) -> None:
    with pytest.raises(InsufficientMemoryError, match="the model does not fit: it needs") as refused:
        planned(model, config(2), 40 * MIB)
    assert "divided" not in str(refused.value), "all memory together holds less than the weights"
    with pytest.raises(InsufficientMemoryError, match=r"not fit even with .* into up to 64 parts$") as refused:
        planned(model, config(4), 40 * MIB)
    assert str(refused.value).startswith("the model does not fit: it needs") and refused.value.missing_bytes


def test_mistakes_of_plans_by_hand(model: Model) -> None:
    def by_hand(*layers: list[float]) -> ClusterConfig:
        names = [{"worker": name, "layers": span} for name, span in zip("abc", layers, strict=False)]
        return config(len(layers), plan=names)

    check_plan(by_hand([0, 1.5], [1.5, 2]), model)
    with pytest.raises(UsageError, match=r"layers \[1\.25, 1\.5\) are on no worker; the model has layers \[0, 2\)"):
        check_plan(by_hand([0, 1.25], [1.5, 2]), model)
    with pytest.raises(ValueError, match="a bound must be a multiple of 1/64"):
        by_hand([0, 1.3], [1.3, 2])

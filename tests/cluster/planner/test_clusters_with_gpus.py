"""Tests of clusters whose workers have different GPUs: rules for one of them, and divided layers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from llamaclust.cluster.config.cluster_config import ClusterConfig
from llamaclust.cluster.control.limits import check_plan
from llamaclust.cluster.control.planning import ClusterResources, plan_cluster
from llamaclust.cluster.control.resources.resource_shares import WorkerResources
from llamaclust.cluster.planner.format import plan_json, plan_lines
from llamaclust.cluster.planner.links import Pairs
from llamaclust.cluster.planner.plan import Plan
from llamaclust.core.errors import InsufficientMemoryError, UsageError
from llamaclust.core.gpus import Gpu
from llamaclust.core.sizes import MIB
from llamaclust.model.loader import Model
from support.models.tiny_architectures import build_architecture
from support.models.tiny_model import build_tiny_model

DEVICES = {"w1": "cuda:0", "w2": "cuda:0,cuda:1"}
BY_HAND = [{"worker": "w1", "layers": [0, 1]}, {"worker": "w2", "layers": [1, 3]}]
RULE = {"tensors": r"blk\.2\.", "device": "CUDA1"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """Opens a model of three layers with experts."""
    return Model.open(build_architecture(tmp_path_factory.mktemp("gpus") / "m.gguf", "llama-experts"))


def planned(
    model: Model,
    devices: Mapping[str, str],
    memory_bytes: int = 8192 * MIB,
    gpu_bytes: int = 1024 * MIB,
    gpu_layers: int | None = None,
    partitions: Pairs = frozenset(),
    **values: object,
) -> Plan:
    """Plans workers with `memory_bytes` and GPUs with `gpu_bytes` each, and runs the checks that `up` runs first."""
    workers = [{"name": name, "device": device, "threads": 1} for name, device in devices.items()]
    settings = {"model": "m.gguf", "workers": workers, "context_length": 64, "max_sequences": 1, **values}
    config = ClusterConfig.model_validate(settings)
    check_plan(config, model)
    resources = {
        name: WorkerResources(
            threads=1,
            free_memory_bytes=memory_bytes,
            machine=name,
            machine_free_bytes=0,
            gpus=tuple(Gpu(gpu, "G", gpu_bytes, gpu_bytes) for gpu in device.split(",") if gpu != "cpu"),
            gpu_layers=gpu_layers,
        )
        for name, device in devices.items()
    }
    return plan_cluster(config, model, ClusterResources(resources, {}, partitions=partitions))


def test_a_rule_for_a_gpu_of_one_worker(model: Model) -> None:
    """The other worker has neither this GPU nor the rule's layers."""
    plan = planned(model, DEVICES, plan=BY_HAND, placement=[RULE])
    (first, second) = plan.stages
    assert (first.worker, second.worker) == ("w1", "w2")
    assert [part.device for part in second.device_layers if part.start <= 2 < part.end] == ["cuda:1"]
    limited = planned(model, DEVICES, plan=BY_HAND, placement=[{**RULE, "workers": ["w2"]}])
    (held,) = (stage.device_layers for stage in limited.stages if stage.worker == "w2")
    assert [part.device for part in held if part.start <= 2 < part.end] == ["cuda:1"]


def test_a_gpu_that_one_of_the_workers_lacks_is_named_with_the_others(model: Model) -> None:
    by_hand = [{"worker": "w2", "layers": [0, 1]}, {"worker": "w1", "layers": [1, 3]}]
    cases: tuple[dict[str, Any], ...] = ({}, {"plan": by_hand})
    for values in cases:
        with pytest.raises(UsageError) as refused:
            planned(model, DEVICES, placement=[RULE], **values)
        told = "there is no cuda:1 among cuda:0; name one of these, or `gpu` for any GPU, or limit the rule to workers"
        assert str(refused.value) == f"placement: {told} that have it: workers: [w2] (worker w1)"
    with pytest.raises(UsageError, match=r"name one of these, or `gpu` for any GPU \(worker w1\)"):
        planned(model, DEVICES, placement=[{**RULE, "device": "CUDA7"}])


def test_layers_divided_by_hand_are_refused_beside_gpus(model: Model) -> None:
    by_hand = [{"worker": "w1", "layers": [0, 1.5]}, {"worker": "w2", "layers": [1.5, 3]}]
    with pytest.raises(UsageError) as refused:
        planned(model, DEVICES, plan=by_hand)
    assert str(refused.value).startswith("the plan: cuda:0 of w1 would be unused: layers are divided")
    assert str(refused.value).endswith("; set the device of w1 to cpu, or divide no layers")
    plan = planned(model, {"w1": "cpu", "w2": "cpu", "w3": "cuda:0"}, plan=by_hand)
    assert plan.expert_shards == 2 and plan.unused_gpus == (), "one without layers has no part"


def test_a_cut_link_that_only_the_advice_needs_hides_no_lack_of_memory(tmp_path: Path) -> None:
    devices, cut = dict.fromkeys(("w1", "w2"), "cuda:0"), frozenset({frozenset(("w1", "w2"))})
    with Model.open(build_tiny_model(tmp_path / "m.gguf", layers=4, ffn=4096)) as large:
        with pytest.raises(InsufficientMemoryError, match="set gpu_layers to auto: the model then fits, with 4 layers"):
            planned(large, devices, 8 * MIB, 48 * MIB, gpu_layers=0)
        with pytest.raises(InsufficientMemoryError, match="the model does not fit"):
            planned(large, devices, 8 * MIB, 48 * MIB, gpu_layers=0, partitions=cut)


def test_gpus_that_divided_layers_leave_unused_are_told(tmp_path: Path) -> None:
    """The model has two layers with 48 MiB of experts each, and no machine has room for a layer."""
    names = dict.fromkeys("abcdef", "cpu") | {"b": "cuda:0,cuda:1"}
    with Model.open(build_tiny_model(tmp_path / "moe.gguf", layers=2, experts=64, ffn=512)) as large:
        plans = (planned(large, names, mib * MIB, MIB) for mib in range(100, 20, -4))
        plan = next(plan for plan in plans if plan.expert_shards > 1)
        lines, values = "\n".join(plan_lines(plan)), plan_json(plan)
        for gpu in ("cuda:0", "cuda:1"):
            assert f"\n  {gpu} of b is unused: layers are divided by their experts, and parts of" in lines
        assert [(gpu["worker"], gpu["device"]) for gpu in values["unused_gpus"]] == [("b", "cuda:0"), ("b", "cuda:1")]
        assert planned(large, names, 400 * MIB, MIB).unused_gpus == ()

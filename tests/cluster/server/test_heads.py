"""Heads that predict further tokens in cluster files: what plans count of them, and which are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llamaclust.cluster.config.cluster_config import ClusterConfig
from llamaclust.cluster.control.limits import check_plan, plan_limits, speculation_settings
from llamaclust.cluster.control.planning import ClusterResources, plan_cluster
from llamaclust.cluster.control.resources.resource_shares import WorkerResources
from llamaclust.core.errors import UsageError
from llamaclust.kernels.cpu.backend import CpuBackend
from llamaclust.model.loader import Model
from llamaclust.model.nextn.program import FAMILIES
from llamaclust.worker.stage.stage_runner import StageRunner
from support.models.tiny.head_models import with_head
from support.models.tiny_architectures import build_architecture

_HEADS: dict[str, Any] = {"speculative": {"heads": True}}


def _config(path: Path, workers: int = 2, **keys: object) -> ClusterConfig:
    names = [{"name": name, "threads": 1} for name in "abc"[:workers]]
    base = {"model": str(path), "workers": names, "context_length": 256, "max_sequences": 4}
    return ClusterConfig.model_validate({**base, **keys})


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_plans_count_what_stages_take(tmp_path: Path, name: str, workers: int) -> None:
    model = Model.open(path := with_head(tmp_path / "model.gguf", name))
    config, plain = _config(path, workers, **_HEADS), _config(path, workers)
    check_plan(config, model)
    resources = ClusterResources({worker.name: WorkerResources(worker.name, 1 << 30) for worker in config.workers}, {})
    plan, without = plan_cluster(config, model, resources), plan_cluster(plain, model, resources)
    limits = plan_limits(config, plan)
    assert limits.nextn and not plan_limits(plain, without).nextn
    for stage in plan.stages:
        runner = StageRunner(CpuBackend(1), model, stage.start, stage.end, limits)
        taken = runner.memory
        runner.close()
        shared = model.file.tensor("token_embd.weight").resident_bytes if workers == 1 else 0
        assert stage.weight_bytes - shared == taken.weight_bytes
        assert stage.kv_bytes == taken.kv_bytes
        assert stage.workspace_bytes >= taken.workspace_bytes
    last, last_without = plan.stages[-1], without.stages[-1]
    if (last.start, last.end) == (last_without.start, last_without.end):
        assert last.weight_bytes > last_without.weight_bytes


def test_a_file_without_a_head_is_refused(tmp_path: Path) -> None:
    model = Model.open(path := build_architecture(tmp_path / "model.gguf", "glm4moe"))
    with pytest.raises(UsageError, match=r"has no head that predicts further tokens.*set heads: false"):
        check_plan(_config(path, **_HEADS), model)


def test_divided_layers_are_refused(tmp_path: Path) -> None:
    model = Model.open(path := with_head(tmp_path / "model.gguf"))
    plan = [{"worker": "a", "layers": [0, 1.5]}, {"worker": "b", "layers": [1.5, 4]}]
    check_plan(_config(path, plan=plan), model)
    with pytest.raises(UsageError, match=r"speculative.heads: .*; leave it out, or divide no layer"):
        check_plan(_config(path, plan=plan, **_HEADS), model)


def test_the_cluster_file_says_whether_heads_draft(tmp_path: Path) -> None:
    for heads in (True, False):
        own = speculation_settings(_config(tmp_path, speculative={"heads": heads}), None)
        assert own is not None and own.head is heads

"""Tests of MTP heads in cluster files: what plans count for them, and which are refused."""

from __future__ import annotations

from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from llamaclust.cli.plans.plan import show_plan
from llamaclust.cluster.config.cluster_config import ClusterConfig
from llamaclust.cluster.control.limits import check_plan, plan_limits, speculation_settings, unused_mtp
from llamaclust.cluster.control.planning import ClusterResources, plan_cluster
from llamaclust.cluster.control.resources.resource_shares import WorkerResources
from llamaclust.cluster.server.drafting import drafting
from llamaclust.cluster.state.events import Event, Notice
from llamaclust.core.errors import UsageError
from llamaclust.kernels.cpu.backend import CpuBackend
from llamaclust.model.loader import Model
from llamaclust.model.nextn.program import FAMILIES
from llamaclust.worker.stage.stage_runner import StageRunner
from support.models.tiny.nextn_models import with_nextn
from support.models.tiny_architectures import build_architecture

_MTP: dict[str, Any] = {"speculative": {"mtp": True}}


def _config(path: Path, workers: int = 2, **keys: object) -> ClusterConfig:
    names = [{"name": name, "threads": 1} for name in "abc"[:workers]]
    base = {"model": str(path), "workers": names, "context_length": 256, "max_sequences": 4}
    return ClusterConfig.model_validate({**base, **keys})


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_plans_count_what_stages_take(tmp_path: Path, name: str, workers: int) -> None:
    model = Model.open(path := with_nextn(tmp_path / "model.gguf", name))
    config, plain = _config(path, workers, **_MTP), _config(path, workers)
    check_plan(config, model)
    resources = ClusterResources({worker.name: WorkerResources(worker.name, 1 << 30) for worker in config.workers}, {})
    plan, without = plan_cluster(config, model, resources), plan_cluster(plain, model, resources)
    limits = plan_limits(config, plan)
    assert limits.nextn and not plan_limits(plain, without).nextn
    for stage in plan.stages:
        runner = StageRunner(CpuBackend(1), model, stage.start, stage.end, limits)
        taken = runner.memory
        runner.close()
        assert stage.weight_bytes == taken.weight_bytes
        assert stage.kv_bytes == taken.kv_bytes
        assert stage.workspace_bytes >= taken.workspace_bytes
    last, last_without = plan.stages[-1], without.stages[-1]
    if (last.start, last.end) == (last_without.start, last_without.end):
        assert last.weight_bytes > last_without.weight_bytes


def test_a_file_without_a_head_is_refused(tmp_path: Path) -> None:
    model = Model.open(path := build_architecture(tmp_path / "model.gguf", "glm4moe"))
    with pytest.raises(UsageError, match=r"has no head for multi-token prediction"):
        check_plan(_config(path, **_MTP), model)


def test_plans_name_a_head_that_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LLAMACLUST_STATE_DIR", str(tmp_path))
    line = "model has a head for multi-token prediction, which is not loaded: set `speculative: {mtp: true}` to use it"
    without = build_architecture(tmp_path / "plain.gguf", "glm4moe")
    ways = {"{}": True, "{mtp: true}": False, "off": False}
    for path, shown in (with_nextn(tmp_path / "model.gguf"), ways), (without, {"{}": False}):
        for value, is_named in shown.items():
            given = [f"model={path}", "context_length=64", "workers=[{name: a}]", f"speculative={value}"]
            show_plan(None, given, as_json=False)
            assert (f"\n  {line}\n" in capsys.readouterr().out) == is_named, (path, value)


async def test_a_start_names_a_head_that_is_not_used(tmp_path: Path) -> None:
    model, told = Model.open(path := with_nextn(tmp_path / "model.gguf")), list[Event]()
    async with AsyncExitStack() as stack:
        await drafting(stack, [(_config(path), model)], told.append)
        assert [event.text for event in told if isinstance(event, Notice)] == [unused_mtp(_config(path), model)]
        told.clear()
        await drafting(stack, [(_config(path, **_MTP), model)], told.append)
        assert not told


def test_divided_layers_are_refused(tmp_path: Path) -> None:
    model = Model.open(path := with_nextn(tmp_path / "model.gguf"))
    plan = [{"worker": "a", "layers": [0, 1.5]}, {"worker": "b", "layers": [1.5, 4]}]
    check_plan(_config(path, plan=plan), model)
    with pytest.raises(UsageError, match=r"speculative.mtp: .*; remove speculative.mtp, or divide no layers"):
        check_plan(_config(path, plan=plan, **_MTP), model)


def test_the_cluster_file_says_whether_heads_draft(tmp_path: Path) -> None:
    for mtp in (True, False):
        own = speculation_settings(_config(tmp_path, speculative={"mtp": mtp}), None)
        assert own is not None and own.mtp is mtp

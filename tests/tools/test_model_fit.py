"""Checks that the memory which `model info` reports equals the memory that loading takes."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llamaclust.cli.main import main
from llamaclust.cluster.config.cluster_config import ClusterConfig
from llamaclust.cluster.control.limits import capacity_of
from llamaclust.cluster.launchers.in_process import LocalSettings, local_capacity
from llamaclust.cluster.planner.costs import WorkerFacts
from llamaclust.cluster.planner.memory import PlanRequest
from llamaclust.cluster.planner.planner import make_plan
from llamaclust.cluster.scheduler.capacity import BlockCounts, blocks_of
from llamaclust.core.limits import StageLimits
from llamaclust.kernels.backend import kv_bytes
from llamaclust.kernels.cpu.backend import CpuBackend
from llamaclust.model.gguf.model_file import open_model
from llamaclust.model.kv_type import KvType
from llamaclust.model.loader import Model
from llamaclust.model.program import KV_BLOCK_TOKENS
from llamaclust.tools.model_fit import Fit, fit
from llamaclust.tools.projector_info import describe_projector
from llamaclust.worker.stage.stage_runner import plan_memory
from support.models.tiny_architectures import build_architecture
from support.models.tiny_model import build_tiny_model
from support.models.vision.tiny_projectors import build_projector
from support.paths import DATA

VOCABULARY = DATA / "tokenizers" / "ggml-vocab-gpt-2.gguf"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("fit") / "tiny.gguf", layers=5, hidden=64, heads=4, ffn=96)


def _limits(tokens: int) -> StageLimits:
    """Returns limits of a cluster with default settings and KV memory for one sequence."""
    config = ClusterConfig.model_validate({"model": "m", "workers": [{"name": "a"}]})
    return capacity_of(config, tokens).stage_limits(BlockCounts(blocks_of(tokens)))


def planned(model: Model, layers: int, context: int) -> int:
    return plan_memory(CpuBackend(1, "generic"), model, 0, layers, _limits(context)).total_bytes


@pytest.mark.parametrize("tied", [False, True])
def test_figures_are_those_of_a_stage(tied: bool, tmp_path: Path) -> None:
    path = build_tiny_model(tmp_path / "m.gguf", layers=2, hidden=64, heads=4, ffn=96, tied=tied)
    found = fit(path, 1 << 40, 1)
    with Model.open(path) as model:
        memory = plan_memory(CpuBackend(1, "generic"), model, 0, 2, _limits(2048))
        layer = model.costs(KvType.F16).layers[0]
    assert (found.weight_bytes, found.workspace_bytes) == (memory.weight_bytes, memory.workspace_bytes)
    assert (found.context_length, found.least_bytes) == (2048, memory.total_bytes)
    assert (found.kv_tokens, found.total_bytes) == (8192, memory.total_bytes + 3 * memory.kv_bytes)
    assert found.kv_bytes_per_token["f16"] * 2048 == memory.kv_bytes
    assert found.kv_bytes_per_token["q8_0"] < found.kv_bytes_per_token["f16"]
    assert found.layer_bytes == (layer.weight_bytes, layer.weight_bytes)
    assert (found.is_whole, found.layers, found.most_context) == (True, 2, 2048)


def test_what_fits_fits_and_one_more_does_not(tiny: Path) -> None:
    with Model.open(tiny) as model:
        for layers in range(1, 5):
            room = planned(model, layers, 2048)
            assert [fit(tiny, size, 1).layers for size in (room - 1, room)] == [layers - 1, layers]
        whole = planned(model, 5, 2048)
        assert [fit(tiny, size, 1).is_whole for size in (whole - 1, whole)] == [False, True]
        tokens = fit(tiny, whole - 10_000, 1).most_context
        assert 0 < tokens < 2048
        assert planned(model, 5, tokens) <= whole - 10_000 < planned(model, 5, tokens + 1)
    none = fit(tiny, 1000, 1)
    assert (none.layers, none.most_context) == (0, 0)


@pytest.mark.parametrize("name", ["qwen3", "gemma3", "qwen35", "lfm2", "granitehybrid", "falcon-h1"])
def test_plans_and_models_in_one_process_reserve_the_same(name: str, tmp_path: Path) -> None:
    """Checks that a worker, this process and `model info` count the same keys, values and states for one context."""
    path = build_architecture(tmp_path / "m.gguf", name)
    found = fit(path, 1 << 40, 1)
    blocks = -(-found.context_length // KV_BLOCK_TOKENS)
    with Model.open(path) as model:
        costs, context = model.costs(KvType.F16), found.context_length
        request = PlanRequest(context, 32, lambda place: 0, max_batch_tokens=544, kv_tokens=context)
        plan = make_plan(costs, [WorkerFacts("a", 1 << 40, None)], request)
        own = local_capacity(model, LocalSettings(context_length=context, max_sequences=32))
        counts = own.blocks(model, blocks)
        limits = replace(_limits(context), window_blocks=plan.window_blocks, state_blocks=plan.state_blocks)
        reserved = kv_bytes(model.program(0, model.layer_count, KvType.F16, context), limits)
    assert plan.kv_blocks == limits.kv_blocks == blocks and own.max_batch_tokens == 544
    assert (counts.window, counts.states) == (plan.window_blocks, plan.state_blocks)
    told = found.least_bytes - found.weight_bytes - found.workspace_bytes
    assert told == plan.stages[0].kv_bytes == reserved
    assert (found.state_bytes > 0) == (plan.state_blocks > 0) == (name not in ("qwen3", "gemma3"))


def info(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(sys, "argv", ["llamaclust", "model", "info", *map(str, words)])
        main()
    out, err = capsys.readouterr()
    return int(str(ended.value.code)), out, err


def test_the_command(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = info(capsys, tiny, "--memory", "8GiB", "--json")
    shown: dict[str, Any] = json.loads(out)
    expected = fit(tiny, 8 << 30, 1).as_json()
    assert (code, shown["memory"], shown["problem"]) == (0, json.loads(json.dumps(expected)), None)
    for key in ("types", "layers", "outside_layers"):
        for share in shown[key]:
            assert share["bits_per_weight"] == pytest.approx(8 * share["bytes"] / share["parameters"], abs=1e-4)
    assert "fits in 8,192.00 MiB, with a context of up to 2048 tokens" in info(capsys, tiny, "--memory", "8GiB")[1]
    assert ": 0 of 5 layers" in info(capsys, tiny, "--memory", "4kB")[1]
    assert json.loads(info(capsys, tiny, "--json")[1])["memory"]["available_bytes"] > 0
    code, out, _ = info(capsys, VOCABULARY, "--json")
    assert code == 0 and json.loads(out)["memory"] is None and "ggml-vocab" in json.loads(out)["problem"]
    assert "cannot be run here: " in info(capsys, VOCABULARY)[1]
    code, out, err = info(capsys, tiny, "--memory", "lots")
    assert (code, out, err.count(os.linesep)) == (2, "", 1) and "--memory: 'lots' is not a size" in err


def test_a_projector(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = build_projector(tmp_path / "mmproj.gguf", "qwen3vl_merger")
    code, out, _ = info(capsys, path, "--json")
    shown = json.loads(out)
    assert (code, shown["memory"], shown["problem"]) == (0, None, None)
    assert shown["projector"] == describe_projector(open_model(path)).as_json()
    assert "rows of 96 channels for the text model, and for its first 2 layers" in info(capsys, path)[1]
    build_projector(path, "gemma3")
    assert "tiles of 32 x 32 pixels" in info(capsys, path)[1]
    build_projector(path, "gemma3", keys={"projector_type": "resampler"})
    assert "cannot be run here: " in info(capsys, path)[1]
    assert "'resampler' is not supported; supported: gemma3" in info(capsys, path)[1]


def test_fields_of_json(tiny: Path) -> None:
    assert set(fit(tiny, 1, 1).as_json()) == {*Fit.__dataclass_fields__, "fits"}

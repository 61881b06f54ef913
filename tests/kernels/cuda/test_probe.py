"""Tests of measurements of a GPU: rates, step times, memory and benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from llamaclust.cli.speed.bench import _table
from llamaclust.cluster.control.stage_memory import rounding_of, workspace_of
from llamaclust.cluster.planner.memory import StagePlace
from llamaclust.core.limits import StageLimits
from llamaclust.kernels.cuda import probe as gpu_probe
from llamaclust.kernels.cuda.backend import CudaBackend
from llamaclust.kernels.cuda.runtime.device import Device
from llamaclust.model.loader import Model
from llamaclust.model.quant_types import QuantType
from llamaclust.tools.bench.bench import BenchTask, run_bench
from llamaclust.worker.devices import backends, profiler
from llamaclust.worker.devices.profiler import ProfiledDevice, try_stages
from llamaclust.worker.stage.stage_runner import StageRunner
from support.cuda.shim_device import ShimDevice
from support.cuda.stages import Free
from support.models.tiny_model import build_tiny_model


def test_speeds_and_limits_are_measured(device: Device) -> None:
    gpu = CudaBackend("cuda:0", device, 1)
    reached, best = gpu.measure(), gpu.limits()
    assert reached.read_bytes_s > 0 and reached.int8_macs_s > 0
    assert best.read_bytes_s > 0 and best.int8_macs_s > 0
    told = gpu.gpu()
    assert (told.device, told.name, told.total_bytes) == ("cuda:0", device.name, device.memory_bytes)
    assert 0 < told.free_bytes <= told.total_bytes


def test_steps_of_a_model_are_tried_on_a_gpu(device: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = build_tiny_model(tmp_path / "m.gguf", layers=3, hidden=64, heads=2, ffn=96, context=64)
    gpu = CudaBackend("cuda:0", device, 1)
    monkeypatch.setattr(profiler, "_LEAST_BYTES", 0)
    monkeypatch.setattr(gpu_probe, "_FLUSHED_BYTES", 1 << 20)
    free = Free.of(device)
    tried = replace(ProfiledDevice.gpu(gpu, 1, ""), size=replace(profiler.GPU, tries={1: 3, 8: 2, 16: 1}))
    with Model.open(path) as model:
        found = try_stages(tried, model)
    assert [one.rows for one in found] == [1, 8, 16]
    assert all(one.stage_s + one.layers_byte_s > 0 <= one.head_s for one in found)
    assert free.taken == 0, "all is given back"


@pytest.mark.parametrize(("start", "end"), [(0, 4), (0, 1), (1, 3), (3, 4)])
def test_a_plan_counts_what_layers_take(device: Device, tmp_path: Path, start: int, end: int) -> None:
    """The plan counts the bytes that rounding adds to each layer, but not those that it adds to KV memory."""
    path = build_tiny_model(tmp_path / "m.gguf", layers=4, hidden=64, heads=2, ffn=96, context=64)
    limits = StageLimits(max_batch_tokens=24, max_outputs=8, max_sequences=2, max_context_tokens=64, kv_blocks=5)
    gpu = CudaBackend("cuda:0", device, 1)
    with Model.open(path) as model:
        rounding = rounding_of(model)("cuda:0")
        assert not isinstance(rounding, int)
        planned = workspace_of(model, limits)(StagePlace(1, 64, end == 4, "cuda:0")) + int(rounding[start, end])
        free = device.free_bytes
        runner = StageRunner(gpu, model, start, end, limits)
        memory, taken = runner.memory, free - device.free_bytes
        runner.close()
    assert taken == memory.total_bytes or not isinstance(device, ShimDevice)
    assert 0 <= planned - memory.workspace_bytes <= (2 << 20) + 4 * 256


@pytest.mark.parametrize("free_bytes", [1 << 20, 3 << 20])
def test_a_gpu_that_is_nearly_full_is_measured(build_shim: Callable[..., Path], free_bytes: int) -> None:
    """A user may name a full GPU that gets no layer."""
    reached = CudaBackend("cuda:0", ShimDevice(build_shim(), memory_bytes=free_bytes), 1).measure()
    assert reached.read_bytes_s > 0 and reached.int8_macs_s > 0


def test_a_model_on_a_gpu_is_measured(device: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = build_tiny_model(tmp_path / "m.gguf", layers=1, hidden=64, heads=2, ffn=96, quant_type=QuantType.Q8_0)
    gpu = CudaBackend("cuda:0", device, 1)
    monkeypatch.setattr(gpu, "close", lambda: None)  # the device is the session's
    monkeypatch.setattr(backends, "open_gpu", lambda name, threads, *_: gpu)
    task = BenchTask(path, 1, prompt=3, generate=2, repeats=1, device="cuda:0")
    report = run_bench(task, lambda what: None)
    assert report.feature_level == gpu.feature_level and report.decode_tok_s > 0 < report.prefill_tok_s
    assert report.machine.read_gb_s > 0 < report.machine.int8_gmac_s
    name = gpu.gpu().name
    assert report.as_json()["gpu"] == name and f"{name} (cuda:0), " in str(_table(report).title)

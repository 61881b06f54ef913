"""What is measured of a GPU, and the benchmark's ways through one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from tiny_model import build_tiny_model

from llamaclust.kernels.cuda import cold_cache
from llamaclust.kernels.cuda.backend import CudaBackend
from llamaclust.kernels.cuda.device import Device
from llamaclust.model.loader import Model
from llamaclust.model.quant_types import QuantType
from llamaclust.tools import bench
from llamaclust.tools.bench import BenchTask, run_bench
from llamaclust.worker import trial
from llamaclust.worker.trial import TrialDevice, try_stages


def test_speeds_and_limits_are_measured(device: Device) -> None:
    card = CudaBackend("cuda:0", device, 1)
    reached, best = card.measure(), card.limits()
    assert reached.read_bytes_s > 0 and reached.int8_macs_s > 0
    assert best.read_bytes_s > 0 and best.int8_macs_s > 0
    told = card.card()
    assert (told.device, told.name, told.total_bytes) == ("cuda:0", device.name, device.memory_bytes)
    assert 0 < told.free_bytes <= told.total_bytes


def test_steps_of_a_model_are_tried_on_a_gpu(device: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = build_tiny_model(tmp_path / "m.gguf", layers=3, hidden=64, heads=2, ffn=96, context=64)
    card = CudaBackend("cuda:0", device, 1)
    monkeypatch.setattr(trial, "_LEAST_BYTES", 0)
    monkeypatch.setattr(cold_cache, "_MOST_BYTES", 1 << 20)
    free = card.free_bytes
    tried = replace(TrialDevice.card(card, 1, ""), size=replace(trial.CARD, tries={1: 3, 8: 2, 16: 1}))
    with Model.open(path) as model:
        found = try_stages(tried, model)
    assert [one.rows for one in found] == [1, 8, 16]
    assert all(one.stage_s + one.layers_byte_s > 0 <= one.head_s for one in found)
    assert card.free_bytes == free, "all is given back"


def test_a_model_on_a_gpu_is_measured(device: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = build_tiny_model(tmp_path / "m.gguf", layers=1, hidden=64, heads=2, ffn=96, quant_type=QuantType.Q8_0)
    card = CudaBackend("cuda:0", device, 1)
    monkeypatch.setattr(card, "close", lambda: None)  # the device is the session's
    monkeypatch.setattr(bench, "open_card", lambda name, threads, cap, kernels_dir: card)
    task = BenchTask(path, 1, prompt=3, generate=2, repeats=1, device="cuda:0")
    report = run_bench(task, lambda what: None)
    assert report.feature_level == card.feature_level and report.decode_tok_s > 0 < report.prefill_tok_s
    assert report.machine.read_gb_s > 0 < report.machine.int8_gmac_s

"""Tests of the profiler: the threads and positions at which it measures a model's steps, and how it evaluates the
times."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llamaclust.core.errors import LoadCancelledError
from llamaclust.kernels.cpu.backend import CpuBackend
from llamaclust.model.loader import Model
from llamaclust.worker.devices import profiler
from llamaclust.worker.devices.profiler import ProfiledDevice, try_stages
from llamaclust.worker.stage.stage_runner import StageRunner
from support.models.tiny_model import build_tiny_model
from support.wire.slow_codec import decode_frame, decode_microbatch


@pytest.fixture
def model(tmp_path: Path) -> Model:
    return Model.open(build_tiny_model(tmp_path / "m.gguf", layers=6, context=512))


def test_each_stage_is_tried_on_threads_of_its_own(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shared pool could have learned to use fewer threads beside other workers, and would mistake steps of other
    stages for similar ones."""
    used: list[CpuBackend] = []

    class Recorded(StageRunner):
        def __init__(self, backend: CpuBackend, *rest: Any) -> None:
            used.append(backend)
            super().__init__(backend, *rest)

    monkeypatch.setattr(profiler, "_LEAST_BYTES", 0)
    monkeypatch.setattr(profiler, "StageRunner", Recorded)
    backend = CpuBackend(2)
    device = ProfiledDevice(backend, 2, backend.feature_level, 1 << 30)
    assert try_stages(device, model) and try_stages(device, model)
    pools = {id(each._pool) for each in (backend, *used)}
    assert len(used) == 6 and len(pools) == 7
    assert all(each._weights is backend._weights for each in used), "weights in memory are shared"


@pytest.mark.parametrize("most", [1, 3], ids=["it loads", "it computes"])
def test_a_measurement_ends_while(model: Model, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[StageRunner] = []
    closed: list[StageRunner] = []

    class Recorded(StageRunner):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            opened.append(self)

        def close(self) -> None:
            closed.append(self)
            super().close()

    def progress(n_bytes: int) -> None:
        if len(opened) == most:
            raise LoadCancelledError("the measurement was cancelled")

    monkeypatch.setattr(profiler, "_LEAST_BYTES", 0)
    monkeypatch.setattr(profiler, "StageRunner", Recorded)
    backend = CpuBackend(1)
    device = ProfiledDevice(backend, 1, backend.feature_level, 1 << 30, progress=progress)
    with pytest.raises(LoadCancelledError):
        try_stages(device, model)
    assert len(opened) == most and closed == opened[::-1]


def test_rows_of_prompts_see_as_many_keys_as_those_of_decode_steps(model: Model) -> None:
    backend = CpuBackend(1)
    for size, counts in ((profiler.PROCESSOR, (128,)), (profiler.GPU, (128, 512))):
        runner = StageRunner(backend, model, 0, 1, size.limits)
        for rows in counts:
            frame, _ = profiler._task(runner, 64, rows, 0)
            (chunk,) = decode_microbatch(decode_frame(frame).header).chunks
            keys = [chunk.position + row for row in range(rows)]
            assert sum(keys) / rows == pytest.approx(256, abs=16)
            assert keys[-1] < size.limits.max_context_tokens
        runner.close()


def test_times_of_few_layers_and_many_lie_on_a_line() -> None:
    assert profiler._line((100.0, 4.0), (300.0, 10.0)) == pytest.approx((1.0, 0.03))
    assert profiler._line((100.0, 3.0), (200.0, 6.0)) == pytest.approx((0.0, 0.03))
    assert profiler._line((100.0, 3.0), (300.0, 2.5)) == (3.0, 0.0), "they differ by noise"


def test_noise_of_one_layer_is_not_taken_for_the_time_of_all() -> None:
    """A line through 1.0 for one layer and 2.6 for two layers would give 1.6 per layer."""
    stage_s, byte_s = profiler._line((1.0, 1.0), (2.0, 2.6))
    assert (stage_s, byte_s) == pytest.approx((0.0, 1.2))

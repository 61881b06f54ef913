"""Tests of plans for mixtures of experts, which count the bytes that steps touch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from llamaclust.cluster.control.resources.resource_shares import measurement_key, most_similar_key
from llamaclust.cluster.planner.costs import StageCosts, WorkerFacts
from llamaclust.cluster.planner.devices import PlannedLayers
from llamaclust.cluster.planner.format import plan_json, plan_lines
from llamaclust.cluster.planner.memory import MemoryModel
from llamaclust.cluster.planner.planner import make_plan
from llamaclust.core.sizes import MIB
from llamaclust.core.version import VERSION
from llamaclust.kernels.cpu.backend import CpuBackend
from llamaclust.model.costs import LayerCost, ModelCosts
from llamaclust.model.kv_type import KvType
from llamaclust.model.loader import Model
from llamaclust.wire.rpc.cache_flush import BYTES as SWEEP_BYTES
from llamaclust.worker.devices import profiler
from llamaclust.worker.devices.profiler import ProfiledDevice, try_stages
from llamaclust.worker.stage.stage_runner import StageRunner
from support.models.tiny_model import build_tiny_model
from support.plans.plan_inputs import LAYER, REQUEST, profile, step_time, worker
from support.seed import SEED
from support.wire.slow_codec import decode_frame

MIXTURE = replace(LAYER, weight_bytes=33 * MIB, idle_bytes=24 * MIB, idle_share=0.75, expert_bytes=32 * MIB)
"""A layer whose experts take 32 MiB, of which a token reads a quarter."""


def test_rows_read_the_distinct_experts_that_they_are_expected_to_choose() -> None:
    """Compares with random rows that choose experts evenly."""
    source = np.random.default_rng(SEED)
    for rows in (1, 2, 8, 40):
        drawn = [{int(e) for _ in range(rows) for e in source.permutation(32)[:8]} for _ in range(400)]
        read = 1 + 32 * sum(map(len, drawn)) / 400 / 32
        assert MIXTURE.touched_bytes(rows) / MIB == pytest.approx(read, rel=0.03)
    assert LAYER.touched_bytes(1) == LAYER.touched_bytes(8) == LAYER.weight_bytes


def test_without_trials_steps_take_what_their_bytes_take() -> None:
    stages = StageCosts.of(ModelCosts(0, 2 * MIB, 0, (MIXTURE,) * 4))
    facts = worker("a", int8=1e6)
    assert 1e3 * stages.decode_s(facts, 0, 4) == pytest.approx((4 * 9 + 2) * MIB / 20e6)
    assert 1e3 * stages.decode_s(facts, 0, 4, 2) == pytest.approx((4 * 15 + 2) * MIB / 20e6)
    assert 1e3 * stages.decode_s(facts, 0, 4, 512) == pytest.approx((4 * 33 + 2) * MIB / 20e6)
    assert 1e3 * stages.prefill_s(facts, 0, 4, 1) == pytest.approx(4 * 9 * MIB / 20e6)
    assert stages.touched_bytes(0, 4) == (4 * 9 + 2) * MIB


def test_parts_of_layers_take_together_what_the_layers_take() -> None:
    """The sums are equal even if reading bounds one part of a layer and products another."""
    few_products = replace(MIXTURE, macs_per_token=9 * 10**6, expert_macs_per_token=10**6)
    many_products = replace(MIXTURE, macs_per_token=900 * 10**6, expert_macs_per_token=899 * 10**6)
    stages = StageCosts.of(ModelCosts(0, 0, 0, (few_products, many_products, LAYER)))
    facts = worker("a", read=20, int8=1)
    whole, experts = stages.decode_table(facts, 4), stages.experts_table(facts, 4, stages.mixtures)
    rest = [4 * 8e6 / 1e9, max(4 * 1e6 / 1e9, MIB / 20e9)]  # bounded by products
    read_s = MIXTURE.touched_expert_bytes(4) / 20e9
    assert [whole[i, i + 1] - experts[i, i + 1] for i in (0, 1)] == pytest.approx(rest)
    assert [experts[0, 1], experts[1, 2]] == pytest.approx([max(read_s, 4e-3), 4 * 0.899])
    assert whole[0, 3] == pytest.approx(whole[0, 1] + whole[1, 2] + whole[2, 3])


def test_states_take_time_to_read_and_to_write() -> None:
    stateful = replace(LAYER, state_bytes=5 * MIB, state_macs_per_token=10**6)
    plain, states = (StageCosts.of(ModelCosts(0, 0, 0, (layer,) * 4)) for layer in (LAYER, stateful))
    facts = worker("a", read=20, int8=1e6)
    for rows in (1, 8):
        more_s = states.decode_s(facts, 1, 3, rows) - plain.decode_s(facts, 1, 3, rows)
        assert more_s == pytest.approx(2 * rows * 2 * 5 * MIB / 20e9), "each sequence has its own"
    assert states.prefill_s(facts, 1, 3, 64) - plain.prefill_s(facts, 1, 3, 64) == pytest.approx(2 * 2 * 5 * MIB / 20e9)
    tried = WorkerFacts("a", None, profile(20, 300, (step_time(1, 0.2, 30.0, 1.0), step_time(8, 0.2, 30.0, 1.0))))
    assert states.decode_s(tried, 0, 2, 8) - plain.decode_s(tried, 0, 2, 8) == pytest.approx(2 * 8 * 10 * MIB * 30e-12)
    slow = worker("a", read=1000, int8=1)
    bound_s = [costs.prefill_s(slow, 0, 1, 100) for costs in (plain, states)]
    assert bound_s[1] - bound_s[0] == pytest.approx(100 * 3 * 10**6 / 1e9), "as many products, of floats"


def test_trials_say_what_a_touched_byte_takes() -> None:
    tried = (step_time(1, 0.2, 30.0, 1.0), step_time(8, 0.2, 30.0, 1.0), step_time(128, 0.2, 900.0, 1.0))
    stages = StageCosts.of(ModelCosts(0, 0, 0, (LAYER, MIXTURE, MIXTURE)))
    facts = WorkerFacts("a", None, profile(20, 300, tried))
    assert stages.decode_s(facts, 1, 3) == pytest.approx(0.2e-3 + 1e-3 + 2 * 9 * MIB * 30e-12)
    assert stages.decode_s(facts, 0, 1, 8) == pytest.approx(0.2e-3 + LAYER.weight_bytes * 30e-12)
    mixture_s = stages.prefill_s(facts, 1, 2, 128) - 0.2e-3
    assert mixture_s == pytest.approx(MIXTURE.touched_bytes(128) * 900e-12)
    assert stages.prefill_s(facts, 0, 1, 128) - 0.2e-3 == pytest.approx(mixture_s), "as many products, fewer bytes"


def test_kv_memory_of_layers_in_ram_leaves_room_for_experts_there() -> None:
    """The parts may name a device by equal but separate objects."""
    request = replace(REQUEST, context_length=64, max_sequences=64)
    sizes = MemoryModel(StageCosts.of(ModelCosts(0, 0, 0, (MIXTURE,) * 4)), request)
    experts_bytes = 2 * 32 * MIB + sizes.workspace_bytes(worker("a"), 2, 3)

    def kv_blocks(ram_bytes: int, *, experts: bool) -> int:
        ram = replace(worker("a"), memory_bytes=ram_bytes)
        gpu = replace(worker("a cuda:0"), device="cuda:0")
        in_ram = [PlannedLayers(replace(ram), 2, 4, (2, 3), is_experts=True)] if experts else []
        return sizes.kv_blocks([PlannedLayers(ram, 0, 2), PlannedLayers(gpu, 2, 4), *in_ram])

    alone = [kv_blocks(size * MIB, experts=False) for size in (72, 75, 80)]
    beside = [kv_blocks(size * MIB + experts_bytes, experts=True) for size in (72, 75, 80)]
    assert alone == beside and 0 < alone[0] < alone[1] < alone[2]
    assert kv_blocks(72 * MIB, experts=True) <= 0, "they do not fit"


def test_a_plan_says_what_a_token_reads() -> None:
    plan = make_plan(ModelCosts(MIB, 2 * MIB, 10**6, (MIXTURE,) * 4), [worker("a")], REQUEST)
    assert plan.stages[0].touched_bytes == (4 * 9 + 2) * MIB
    assert plan_json(plan)["stages"][0]["touched_bytes"] == (4 * 9 + 2) * MIB
    assert "135 MiB weights (38 read a token)" in plan_lines(plan)[1]
    dense = make_plan(ModelCosts(MIB, 2 * MIB, 10**6, (LAYER,) * 4), [worker("a")], REQUEST)
    assert "read a token" not in plan_lines(dense)[1]


def test_layers_of_mixtures_are_tried_and_rows_of_a_whole_prompt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profiler, "_LEAST_BYTES", 0)
    backend = CpuBackend(1)
    device = ProfiledDevice(backend, 1, backend.feature_level, 1 << 30)
    model = Model.open(build_tiny_model(tmp_path / "m.gguf", layers=6, context=1024, experts=4))
    layers = model.costs(KvType.F16).layers
    assert [one.rows for one in try_stages(device, model)] == [1, 8, 128, 512]
    assert profiler._first_tried(layers) == 0
    dense = LayerCost(MIB, 10**6, 1024)
    assert profiler._first_tried((dense, *layers)) == 1
    assert profiler._first_tried((dense,) * 9) == profiler._first_tried((dense, dense, *layers[:2])) == 0


def test_room_is_measured_for_the_layers_that_are_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers before the first profiled one are unlike the others, so their memory says nothing."""
    monkeypatch.setattr(profiler, "_LEAST_BYTES", 0)
    backend = CpuBackend(1)
    monkeypatch.setattr(profiler, "_first_tried", lambda costs: 2)
    model = Model.open(build_tiny_model(tmp_path / "m.gguf", layers=7, context=512))
    asked = []

    class Device(ProfiledDevice):
        def left_bytes(self, model: Model, start: int, end: int) -> int:
            asked.append((start, end))
            return 0

    try_stages(Device(backend, 1, backend.feature_level, 1 << 30), model)
    assert asked[:2] == [(2, 6), (2, 5)] and min(start for start, _ in asked) == 2


@pytest.mark.parametrize(("left_bytes", "most"), [(1 << 30, 3), (SWEEP_BYTES, 1)])
def test_stages_are_tried_in_turns_where_memory_allows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left_bytes: int, most: int
) -> None:
    monkeypatch.setattr(profiler, "_LEAST_BYTES", 0)
    opened: list[int] = []

    class Runner(StageRunner):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            opened.append(opened[-1] + 1 if opened else 1)

        def close(self) -> None:
            opened.append(opened[-1] - 1)
            super().close()

    class Device(ProfiledDevice):
        def left_bytes(self, model: Model, start: int, end: int) -> int:
            return left_bytes

    monkeypatch.setattr(profiler, "StageRunner", Runner)
    backend = CpuBackend(1)
    model = Model.open(build_tiny_model(tmp_path / "m.gguf", layers=4, context=512))
    assert len(try_stages(Device(backend, 1, backend.feature_level, 1 << 30), model)) == 3
    assert len(opened) == 6 and max(opened) == most and opened[-1] == 0


def test_rows_of_a_trial_differ() -> None:
    """Equal rows would choose the same experts."""
    program = SimpleNamespace(is_first=False, is_last=False, hidden=SimpleNamespace(width=64))
    runner: Any = SimpleNamespace(program=program, model_id="a" * 64)
    frame, _ = profiler._task(runner, 320, 8, 1)
    hidden = decode_frame(frame).hidden(8, 64)
    assert len({row.tobytes() for row in hidden}) == 8 and np.isfinite(hidden).all()


def test_measurements_in_another_unit_are_not_found() -> None:
    """An earlier release measured held bytes alone."""
    key = measurement_key("cpu x", 2, 4, "a" * 64)
    assert key == f"cpu x, one of 2 workers with 4 threads, program {VERSION}, model {'a' * 32}, unit 2"
    assert most_similar_key(key, [key.removesuffix(", unit 2")]) is None
    assert most_similar_key(key, [key.replace("of 2", "of 3")]) is not None
    assert most_similar_key(key, [key.replace(VERSION, "0.0.1")]) is None, "its kernels were others"
    assert measurement_key("cpu x", 2, 4) == f"cpu x, one of 2 workers with 4 threads, program {VERSION}"

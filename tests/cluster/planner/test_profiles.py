"""Tests of steps that workers time before they hold layers, their use in plans, and links of later workers."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llamaclust.cluster.control.cluster_state import ClusterState, PipelineLoss, Waits
from llamaclust.cluster.control.observations import Signal, Tick
from llamaclust.cluster.control.resources.link_profiling import LinkMonitor
from llamaclust.cluster.control.state_store import StateStore
from llamaclust.cluster.control.weight_sources import nearest_first
from llamaclust.cluster.planner.costs import StageCosts, WorkerFacts
from llamaclust.cluster.planner.format import plan_json, plan_lines
from llamaclust.cluster.planner.links import UNKNOWN, Links
from llamaclust.cluster.planner.memory import PlanRequest
from llamaclust.cluster.planner.planner import make_plan
from llamaclust.cluster.state.measurements import read_profiles, write_profiles
from llamaclust.core.profile import Profile, StepTime, at_rows, mean_step_times
from llamaclust.core.sizes import MIB
from llamaclust.kernels.cpu.backend import CpuBackend
from llamaclust.model.costs import LayerCost, ModelCosts
from llamaclust.model.loader import Model
from llamaclust.wire.rpc.cache_flush import largest_cache_bytes
from llamaclust.worker.devices import profiler
from llamaclust.worker.devices.profiler import ProfiledDevice, try_stages
from support.models.tiny_model import build_tiny_model
from support.plans.plan_inputs import link, profile, split_by_hand, step_time

GB = 10**9
ISOLATED = (step_time(1, 0.2, 30.0, 1.0), step_time(8, 0.3, 90.0, 1.4), step_time(128, 0.6, 900.0, 5.0))
CONCURRENT = tuple(replace(p, layers_byte_s=2 * p.layers_byte_s) for p in ISOLATED)
MODEL = ModelCosts(GB, GB, 10**9, (LayerCost(GB // 10, 10**8, 1024),) * 10, hidden_bytes=8192)


def test_between_the_points_and_beyond_lie_lines() -> None:
    assert at_rows(ISOLATED, 8) == ISOLATED[1]
    assert at_rows(ISOLATED, 4).layers_byte_s == pytest.approx((30 + 3 / 7 * 60) / 1e12)
    assert at_rows(ISOLATED, 512).layers_byte_s == pytest.approx((900 + 384 / 120 * 810) / 1e12)
    assert at_rows(ISOLATED[:1], 512) == ISOLATED[0]
    assert mean_step_times([ISOLATED, (), CONCURRENT])[0].layers_byte_s == pytest.approx(45e-12)
    assert mean_step_times([(), ()]) == ()


def test_plans_predict_what_was_tried_and_what_a_hop_takes() -> None:
    links = Links({frozenset("ab"): link(0.5, 1.0)})
    workers = [WorkerFacts(name, 20 * GB, profile(20, 300, CONCURRENT, ISOLATED)) for name in "ab"]
    halves = split_by_hand(("a", 0, 5), ("b", 5, 10))
    request = PlanRequest(1024, 8, lambda place: MIB, manual=halves, links=links)
    plan = make_plan(MODEL, workers, request)
    assert plan.prediction is not None
    assert [1e3 * stage.decode_s for stage in plan.prediction.stages] == pytest.approx([0.2 + 15, 0.2 + 15 + 1.0])
    assert 1e3 * plan.prediction.token_s == pytest.approx(2 * 0.2 + 30 + 1.0 + 2 * 0.5 + 8192 / 1e6), "at 1 GB/s"
    costs = StageCosts.of(MODEL)
    assert 1e3 * costs.decode_s(workers[0], 0, 5, 8) == pytest.approx(0.3 + 45)
    assert 1e3 * costs.decode_s(workers[0], 0, 5, 8, concurrent=True) == pytest.approx(0.3 + 90)
    assert 1e3 * costs.prefill_s(workers[1], 5, 10, 128) == pytest.approx(0.6 + 450), "prompts have no head"


@pytest.mark.parametrize("objective", ["latency", "throughput"])
def test_steps_that_a_worker_says_take_no_time_make_a_plan(objective: str) -> None:
    nothing = tuple(StepTime(point.rows, 0.0, 0.0, 0.0) for point in ISOLATED)
    workers = [WorkerFacts(name, 20 * GB, profile(20, 300, nothing)) for name in "ab"]
    plan = make_plan(MODEL, workers, PlanRequest(1024, 8, lambda place: MIB, objective=objective))
    assert plan.prediction is not None and plan.prediction.tokens_per_s > 0
    assert plan_lines(plan) and plan_json(plan)


def test_a_second_stage_that_takes_a_token_more_than_it_saves_a_prompt_stays_a_spare() -> None:
    slow_python = (step_time(1, 20.0, 30.0, 1.0), step_time(8, 21.0, 90.0, 1.4), step_time(128, 21.0, 900.0, 5.0))
    for tried, stages in ((ISOLATED, 2), (slow_python, 1)):
        workers = [WorkerFacts(name, 20 * GB, profile(20, 300, tried)) for name in "ab"]
        plan = make_plan(MODEL, workers, PlanRequest(1024, 8, lambda place: MIB))
        assert len(plan.stages) == stages


def test_a_worker_that_has_all_layers_computes_alone() -> None:
    """Core contention makes two workers of a machine take more than twice as long, so that one alone is faster."""
    crowded = tuple(replace(p, layers_byte_s=2.4 * p.layers_byte_s) for p in ISOLATED)
    for concurrent, stages in ((ISOLATED, 2), (crowded, 1)):
        workers = [WorkerFacts(name, 20 * GB, profile(20, 300, concurrent, ISOLATED)) for name in "ab"]
        plan = make_plan(MODEL, workers, PlanRequest(1024, 8, lambda place: MIB, objective="throughput"))
        assert len(plan.stages) == stages


def test_trials_are_kept_with_measurements(tmp_path: Path) -> None:
    known = {"a": Profile(profile(1.0, 2.0, CONCURRENT, ISOLATED), (profile(5.0),)), "b": Profile(profile(3.0, 4.0))}
    write_profiles(tmp_path, known)
    assert read_profiles(tmp_path) == known


def test_a_worker_tries_steps_of_any_model_that_is_large_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model.open(build_tiny_model(tmp_path / "m.gguf", layers=6, context=512))
    backend = CpuBackend(1)
    device = ProfiledDevice(backend, 1, backend.feature_level, 1 << 30)
    assert try_stages(device, model) == (), "it stays in the caches"
    monkeypatch.setattr(profiler, "_LEAST_BYTES", 0)
    found = try_stages(device, model)
    assert [one.rows for one in found] == [1, 8, 128]
    assert all(isinstance(one, StepTime) and one.stage_s + one.layers_byte_s > 0 for one in found)
    assert found[0].head_s >= 0 and found[2].layers_byte_s > found[0].layers_byte_s
    short = ProfiledDevice(backend, 1, backend.feature_level, 65 << 20)
    assert try_stages(short, model) == (), "memory is short"
    least = replace(device, place=7, size=replace(profiler.PROCESSOR, layers_bytes=0))
    assert len(try_stages(least, model)) == 3, "layers 2 and 3"


def test_workers_that_were_started_one_after_the_other_try_different_layers() -> None:
    for place in (1, 4096, 32767):
        tried = [profiler._ranges(22, 3, place + other) for other in range(4)]
        layers = [layer for ranges in tried for layer in range(*ranges[1])]
        assert len(set(layers)) == 12 and max(layers) < 21
        assert all(one == (some[0], some[0] + 1) and last == (21, 22) for one, some, last in tried)
    assert profiler._ranges(30, 29, 4096) == [(0, 1), (0, 29), (29, 30)]


def test_sweeps_are_as_large_as_the_largest_cache(tmp_path: Path) -> None:
    def cache(*sizes: str) -> int:
        for index, size in enumerate(sizes):
            (tmp_path / f"index{index}").mkdir(exist_ok=True)
            (tmp_path / f"index{index}" / "size").write_text(size)
        return largest_cache_bytes(tmp_path)

    assert cache() == cache("48K\n", "2048K\n", "32768K\n") == 64 * MIB
    assert cache("48K", "2048K", "491520K\n") == 480 * MIB
    assert cache("48K", "what", "98304K\n") == 96 * MIB


def test_weights_come_from_the_same_machine_then_over_the_fastest_links() -> None:
    hosts = {"me": "x", "near": "x", "fast": "y", "alike": "w", "slow": "y", "unknown": "z"}
    measured = {"fast": link(0.2, 1.0), "alike": link(0.2, 1.01), "slow": link(0.2, 80.0)}
    links = Links({frozenset(("me", name)): known for name, known in measured.items()})
    names = ["unknown", "slow", "alike", "fast", "near", "me"]
    assert nearest_first("me", names, hosts, links) == ["near", "alike", "fast", "slow", "unknown"]
    assert nearest_first("me", names, hosts, links, place=3) == ["near", "fast", "alike", "slow", "unknown"]
    assert nearest_first("me", ["a", "b", "c"], dict.fromkeys(["me", *"abc"], "x"), UNKNOWN, 1) == ["b", "c", "a"]


def test_links_are_measured_again_once_a_pipeline_serves() -> None:
    known, measured, present = [], [], {"a": object(), "b": object()}
    new = Links({frozenset("ab"): link(3.0, 4.0)})

    async def measure(workers: Any) -> Links:
        measured.append(dict(workers))
        return new

    async def run() -> None:
        def update(links: Links) -> bool:
            known.append(links)
            return True

        registry: Any = SimpleNamespace(present=present)
        store = StateStore(ClusterState(Waits(120.0, 120.0), 2, Tick(0.0), PipelineLoss(0.0)))
        runner: Any = SimpleNamespace(planner=SimpleNamespace(update=update), store=store)
        monitor = LinkMonitor(measure, registry, [runner], lambda event: None)
        monitor.measure_again()
        await asyncio.sleep(0.01)
        assert not measured, "a pipeline comes first"
        store.settled.set()
        async with asyncio.timeout(60):
            assert await store.next(None) == Signal.LINKS_CHANGED
        assert not store.settled.is_set()

    asyncio.run(run())
    assert known == [new] and measured == [present]

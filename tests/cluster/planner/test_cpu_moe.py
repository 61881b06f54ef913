"""Tests of experts in RAM beside a GPU: their placement, to the byte, and predicted speeds."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from llamaclust.cluster.planner.costs import GpuFacts, StageCosts, WorkerFacts
from llamaclust.cluster.planner.devices import PlannedLayers
from llamaclust.cluster.planner.format import plan_json, plan_lines
from llamaclust.cluster.planner.memory import MemoryModel, PlanRequest
from llamaclust.cluster.planner.plan import Plan
from llamaclust.cluster.planner.planner import make_plan
from llamaclust.cluster.planner.predict import predict_again
from llamaclust.core.errors import InsufficientMemoryError
from llamaclust.core.gpus import DeviceLayers, Placement
from llamaclust.core.sizes import MIB
from llamaclust.model.costs import LayerCost, ModelCosts
from support.plans.plan_inputs import REQUEST, profile, worker
from support.seed import SEED

EXPERTS, REST = 300 * MIB, 20 * MIB
AUTO: PlanRequest = replace(REQUEST, max_sequences=1)
DENSE = LayerCost(weight_bytes=REST, macs_per_token=20_000_000, kv_bytes_per_token=1024)
SPARSE = replace(
    DENSE,
    weight_bytes=REST + EXPERTS,
    macs_per_token=40_000_000,
    idle_bytes=EXPERTS * 7 // 8,
    idle_share=7 / 8,
    expert_bytes=EXPERTS,
    expert_macs_per_token=20_000_000,
)
MODEL = ModelCosts(20 * MIB, 20 * MIB, 20_000_000, (DENSE, *[SPARSE] * 11), hidden_bytes=8192)


def machine(
    gpu_mib: int, ram_mib: int = 10_000, gpu_layers: int | None = None, cpu_moe: int | None = None
) -> WorkerFacts:
    gpu = GpuFacts("cuda:0", gpu_mib * MIB, profile(900, 30_000))
    facts = replace(worker("a", ram_mib), gpus=(gpu,), gpu_layers=gpu_layers)
    return replace(facts, placement=Placement(cpu_moe=cpu_moe))


def placed(plan: Plan) -> tuple[DeviceLayers, ...]:
    (stage,) = plan.stages
    return stage.device_layers


def test_whole_layers_where_all_fit() -> None:
    assert placed(make_plan(MODEL, [machine(5000)], AUTO)) == (DeviceLayers("cuda:0", 0, 12),)


def test_attention_of_all_layers_comes_before_experts() -> None:
    """Whole layers in 1800 MiB would leave six or seven of twelve on the processor."""
    plan = make_plan(MODEL, [machine(1800)], AUTO)
    (part,) = placed(plan)
    assert (part.device, part.start, part.end) == ("cuda:0", 0, 12)
    assert part.cpu_moe in [tuple(range(1, end)) for end in (6, 7, 8)]
    whole = make_plan(MODEL, [machine(1800, cpu_moe=0)], AUTO)
    assert placed(whole)[0].device == "cpu"
    assert plan.prediction is not None and whole.prediction is not None
    assert plan.prediction.token_s < whole.prediction.token_s


def test_bytes_of_both_devices() -> None:
    plan = make_plan(MODEL, [machine(1800)], AUTO)
    gpu, ram = plan.stages[0].devices
    moved = len(gpu.cpu_moe)
    assert (ram.device, ram.is_experts, ram.start, ram.end) == ("cpu", True, 1, moved + 1)
    assert gpu.cpu_moe == ram.cpu_moe == tuple(range(1, moved + 1))
    assert ram.weight_bytes == moved * EXPERTS and ram.kv_bytes == 0
    assert gpu.weight_bytes == (20 + 20 + 12 * 20) * MIB + (11 - moved) * EXPERTS
    assert plan.stages[0].weight_bytes == gpu.weight_bytes + ram.weight_bytes
    assert gpu.bytes <= 1800 * MIB < gpu.bytes + EXPERTS + gpu.kv_bytes
    assert ram.touched_bytes == pytest.approx(ram.weight_bytes / 8, rel=0.01)
    assert gpu.touched_bytes + ram.touched_bytes == plan.stages[0].touched_bytes


def test_too_little_memory_for_attention_of_all_layers() -> None:
    """The first layers are then on the processor as a whole, and experts of all others in RAM."""
    first, second = placed(make_plan(MODEL, [machine(220)], AUTO))
    assert (first.device, first.start) == ("cpu", 0) and first.end == second.start > 0
    assert (second.end, second.cpu_moe) == (12, tuple(range(max(1, second.start), 12)))


@pytest.mark.parametrize("count", [1, 2, 5, 12, 99])
def test_a_number_of_layers_is_obeyed(count: int) -> None:
    """The first layer has no experts, so a rule for it alone moves nothing."""
    (part,) = placed(make_plan(MODEL, [machine(5000, cpu_moe=count)], AUTO))
    assert part == DeviceLayers("cuda:0", 0, 12, tuple(range(1, min(count, 12))))


def test_a_number_of_layers_on_gpus_is_obeyed_too() -> None:
    first, second = placed(make_plan(MODEL, [machine(1000, gpu_layers=8)], AUTO))
    assert first == DeviceLayers("cpu", 0, 4) and (second.start, second.end) == (4, 12) and second.cpu_moe[0] == 4


def test_ram_for_experts_may_be_short() -> None:
    """RAM is too small for what the GPU leaves; the error names the missing MiB."""
    with pytest.raises(InsufficientMemoryError, match="MiB are missing"):
        make_plan(MODEL, [machine(1800, ram_mib=1000)], AUTO)
    with pytest.raises(InsufficientMemoryError, match="MiB are missing"):
        make_plan(MODEL, [machine(5000, ram_mib=1000, cpu_moe=12)], AUTO)
    make_plan(MODEL, [machine(5000, ram_mib=1000)], AUTO)


def test_models_without_experts_are_placed_as_before() -> None:
    dense = replace(MODEL, layers=(replace(DENSE, weight_bytes=300 * MIB),) * 12)
    assert make_plan(dense, [machine(1800)], AUTO) == make_plan(dense, [machine(1800, cpu_moe=0)], AUTO)


def test_the_prediction_is_the_sum_of_both_devices() -> None:
    """Each device reads its bytes at its own speed; mixtures add exchanges, layers on the GPU add launches."""
    plan, facts = make_plan(MODEL, [machine(1800)], AUTO), machine(1800)
    gpu, ram = plan.stages[0].devices
    assert plan.prediction is not None and facts.profile is not None
    reads_s = gpu.touched_bytes / 900e9 + ram.touched_bytes / facts.profile.read_bytes_s
    exchanges_s = len(gpu.cpu_moe) * (50e-6 + 2 * 8192 / 12e9) + (gpu.end - gpu.start) * 30e-6
    assert plan.prediction.token_s == pytest.approx(reads_s + exchanges_s, rel=1e-3)
    assert predict_again(StageCosts.of(MODEL), plan, {"a": facts}, 1, AUTO.links) == plan.prediction


def test_the_text_and_json_say_it() -> None:
    plan = make_plan(MODEL, [machine(1800)], AUTO)
    moved = placed(plan)[0].cpu_moe
    text, end = "\n".join(plan_lines(plan)), moved[-1] + 1
    assert f", experts of [1, {end}) in RAM" in text and f"    cpu: experts of layers [1, {end}), " in text
    devices = plan_json(plan)["stages"][0]["devices"]
    assert [(part["cpu_moe"], part["is_experts"]) for part in devices] == [(moved, False), (moved, True)]


def test_random_machines_hold_every_layer_and_every_expert_once() -> None:
    """Plans stay within the memory of each device; less GPU memory is never faster."""
    draws, tried = random.Random(SEED), 0
    for _ in range(40):
        gpu_mib, ram_mib = draws.randint(150, 4500), draws.randint(500, 6000)
        try:
            plan = make_plan(MODEL, [machine(gpu_mib, ram_mib)], AUTO)
        except InsufficientMemoryError:
            continue
        tried += 1
        taken = {"cpu": 0, "cuda:0": 0}
        for part in plan.stages[0].devices:
            taken[part.device] += part.bytes
        assert taken["cpu"] <= ram_mib * MIB and taken["cuda:0"] <= gpu_mib * MIB, (gpu_mib, ram_mib)
        parts = placed(plan)
        assert [part.start for part in parts] == [0, *(part.end for part in parts[:-1])] and parts[-1].end == 12
        assert plan.stages[0].weight_bytes == StageCosts.of(MODEL).weight_bytes(0, 12)
        wider = make_plan(MODEL, [machine(gpu_mib + 400, ram_mib)], AUTO)
        assert wider.prediction is not None and plan.prediction is not None
        assert wider.prediction.token_s <= plan.prediction.token_s * 1.0001
    assert tried > 5


def test_experts_take_no_kv_memory() -> None:
    sizes = MemoryModel(StageCosts.of(MODEL), AUTO)
    parts = sizes.parts(PlannedLayers(machine(1800), 1, 3, (1, 2), is_experts=True), 1)
    assert parts["weights"] == 2 * EXPERTS and set(parts) == {"weights", "workspace"}


def test_memory_for_copies_of_experts() -> None:
    """Copies get all memory that is left, in units of 2 MiB, or the user's limit; the placement of layers stays."""
    plan = make_plan(MODEL, [machine(1951)], AUTO)
    gpu, ram = plan.stages[0].devices
    assert gpu.memory_bytes is not None and ram.experts_cache_bytes == 0
    assert 0 <= gpu.memory_bytes - gpu.bytes - gpu.experts_cache_bytes < 2 * MIB
    assert gpu.experts_cache_bytes % (2 * MIB) == 0 < gpu.experts_cache_bytes
    assert plan.stages[0].device_layers[0].experts_cache_bytes == gpu.experts_cache_bytes
    shown = f"in RAM, up to {gpu.experts_cache_bytes // MIB} MiB for copies of some of them"
    assert any(shown in line for line in plan_lines(plan))
    for limit_bytes, given in ((0, 0), (5 * MIB, 4 * MIB), (1 << 40, gpu.experts_cache_bytes)):
        limited = make_plan(MODEL, [machine(1951)], replace(AUTO, experts_cache_bytes=limit_bytes))
        assert limited.stages[0].devices[0] == replace(gpu, experts_cache_bytes=given)
        assert limited.prediction == plan.prediction and placed(limited) == placed(plan)
    (whole,) = make_plan(MODEL, [machine(5000)], AUTO).stages[0].devices
    assert whole.experts_cache_bytes == 0, "no experts are in RAM"

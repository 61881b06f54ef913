"""Tests of the user's rules for layers and experts: the planner obeys them, and decides the rest by memory."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from llamaclust.cluster.planner.costs import GpuFacts, StageCosts, WorkerFacts
from llamaclust.cluster.planner.manual import Assignment
from llamaclust.cluster.planner.plan import Plan
from llamaclust.cluster.planner.planner import make_plan
from llamaclust.core.errors import InsufficientMemoryError, UsageError
from llamaclust.core.gpus import DeviceLayers, Placement
from llamaclust.core.sizes import MIB
from llamaclust.model.costs import LayerCost, ModelCosts
from support.plans.plan_inputs import REQUEST, profile, split_by_hand, worker
from support.seed import SEED

LAYERS = 12
EXPERTS, REST = 300 * MIB, 20 * MIB
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
MODEL = ModelCosts(20 * MIB, 20 * MIB, 20_000_000, (DENSE, *[SPARSE] * (LAYERS - 1)), hidden_bytes=8192)
ONE = replace(REQUEST, max_sequences=1)


def machine(placement: Placement, *gpu_mib: int, ram_mib: int = 10_000) -> WorkerFacts:
    gpus = tuple(GpuFacts(f"cuda:{index}", mib * MIB, profile(900, 30_000)) for index, mib in enumerate(gpu_mib))
    return replace(worker("a", ram_mib), gpus=gpus, placement=placement)


def rules(
    layers: dict[int, str] | None = None, experts: dict[int, bool] | None = None, cpu_moe: int | None = None
) -> Placement:
    said, moved = layers or {}, experts or {}
    return Placement(tuple(map(said.get, range(LAYERS))), tuple(map(moved.get, range(LAYERS))), cpu_moe)


def placed(plan: Plan) -> tuple[DeviceLayers, ...]:
    (stage,) = plan.stages
    return stage.device_layers


def test_experts_of_chosen_layers() -> None:
    placement = rules(experts=dict.fromkeys((3, 7, 8), True))
    plan = make_plan(MODEL, [machine(placement, 5000)], ONE)
    assert placed(plan) == (DeviceLayers("cuda:0", 0, 12, (3, 7, 8)),)
    gpu, ram = plan.stages[0].devices
    assert (ram.start, ram.end, ram.weight_bytes) == (3, 9, 3 * EXPERTS)
    assert gpu.weight_bytes == StageCosts.of(MODEL).weight_bytes(0, 12) - 3 * EXPERTS
    assert gpu.touched_bytes + ram.touched_bytes == plan.stages[0].touched_bytes


def test_open_experts_follow_from_memory() -> None:
    """Experts that must stay on the GPU displace as many others, and the reverse."""
    free = placed(make_plan(MODEL, [machine(rules(), 1800)], ONE))[0].cpu_moe
    kept = placed(make_plan(MODEL, [machine(rules(experts={1: False, 2: False}), 1800)], ONE))[0].cpu_moe
    assert free == tuple(range(1, 1 + len(free))) and kept == tuple(range(3, 3 + len(free)))
    moved = placed(make_plan(MODEL, [machine(rules(experts={11: True, 10: True}), 1800)], ONE))[0].cpu_moe
    assert moved == (*range(1, len(free) - 1), 10, 11)


def test_the_same_experts_have_the_same_prediction_however_they_are_chosen() -> None:
    by_number = make_plan(MODEL, [machine(Placement(cpu_moe=6), 5000)], ONE)
    by_rule = make_plan(MODEL, [machine(rules(experts=dict.fromkeys(range(1, 6), True), cpu_moe=0), 5000)], ONE)
    assert by_number == by_rule and by_rule.prediction is not None
    others = make_plan(MODEL, [machine(rules(experts=dict.fromkeys(range(7, 12), True), cpu_moe=0), 5000)], ONE)
    assert others.prediction is not None
    assert others.prediction.token_s == pytest.approx(by_rule.prediction.token_s)


def test_whole_layers() -> None:
    first, second = placed(make_plan(MODEL, [machine(rules(dict.fromkeys(range(4), "ram"), cpu_moe=0), 5000)], ONE))
    assert (first, second) == (DeviceLayers("cpu", 0, 4), DeviceLayers("cuda:0", 4, 12))
    wanted = replace(machine(rules({5: "gpu"}, cpu_moe=0), 5000), gpu_layers=2)
    assert placed(make_plan(MODEL, [wanted], ONE)) == (DeviceLayers("cpu", 0, 5), DeviceLayers("cuda:0", 5, 12))


def test_layers_of_several_gpus() -> None:
    """The last GPU takes as many layers as fit, except those that rules give to the other one."""
    free = placed(make_plan(MODEL, [machine(rules(cpu_moe=0), 5000, 5000)], ONE))
    assert free == (DeviceLayers("cuda:1", 0, 12),)
    said = rules({2: "cuda:0", 6: "cuda:0", 9: "cuda:1"}, cpu_moe=0)
    parts = placed(make_plan(MODEL, [machine(said, 5000, 5000)], ONE))
    assert parts == (DeviceLayers("cuda:0", 0, 7), DeviceLayers("cuda:1", 7, 12))


@pytest.mark.parametrize(
    ("layers", "told"),
    [
        ({3: "ram"}, "layer 3 in RAM comes after layer 0, which may be on a GPU"),
        ({0: "ram", 1: "ram", 2: "gpu", 3: "ram"}, "layer 3 in RAM comes after layer 2, which may be on a GPU"),
        ({3: "cuda:1", 5: "cuda:0"}, "layer 5 on cuda:0 comes after layer 3 on cuda:1"),
        ({3: "cuda:2"}, "there is no cuda:2 among cuda:0, cuda:1; name one of these, or `gpu` for any GPU"),
    ],
)
def test_devices_hold_layers_in_order(layers: dict[int, str], told: str) -> None:
    with pytest.raises(UsageError, match=f"^placement: {told}"):
        rules(layers).check(["cuda:0", "cuda:1"], 0, LAYERS)
    rules({0: "ram", 1: "ram", 3: "cuda:0", 5: "gpu", 7: "cuda:1"}).check(["cuda:0", "cuda:1"], 0, LAYERS)
    rules({3: "ram"}).check(["cuda:0"], 3, LAYERS)


def test_what_does_not_fit_is_refused() -> None:
    """The rules place layers and experts on a GPU, or in RAM, with too little memory."""
    for placement in (rules({0: "gpu"}, cpu_moe=0), rules(dict.fromkeys(range(12), "gpu"), {11: False}, cpu_moe=5)):
        with pytest.raises(InsufficientMemoryError, match="MiB are missing"):
            make_plan(MODEL, [machine(placement, 1000, ram_mib=10_000)], ONE)
    with pytest.raises(InsufficientMemoryError, match="MiB are missing"):
        make_plan(MODEL, [machine(rules(experts=dict.fromkeys(range(12), True)), 5000, ram_mib=1000)], ONE)


def drawn(draws: random.Random, gpus: int) -> Placement:
    """Draws layers in the order of devices, and experts at random."""
    cuts = sorted(draws.choices(range(LAYERS + 1), k=gpus))
    wanted = ["ram" if layer < cuts[0] else f"cuda:{sum(layer >= cut for cut in cuts) - 1}" for layer in range(LAYERS)]
    said = [device if device == "ram" or draws.random() < 0.3 else None for device in wanted]
    experts = [draws.choice([True, False, None, None]) for _ in range(LAYERS)]
    return Placement(tuple(said), tuple(experts), draws.choice([None, 0, 3]))


def test_random_rules_are_obeyed_by_every_stage() -> None:
    """Plans have one worker or two; each device's layers fit in its memory, and all layers are held once."""
    draws, tried = random.Random(SEED), 0
    for _ in range(60):
        gpus = [draws.randint(500, 4500) for _ in range(draws.choice([1, 1, 2]))]
        placement = drawn(draws, len(gpus))
        placement.check([f"cuda:{index}" for index in range(len(gpus))], 0, LAYERS)
        facts, cut = [machine(placement, *gpus, ram_mib=draws.randint(1000, 6000))], draws.randint(1, LAYERS - 1)
        manual: tuple[Assignment, ...] | None = None
        if draws.random() < 0.5:
            facts.append(worker("b", 6000))
            manual = split_by_hand(("a", 0, cut), ("b", cut, LAYERS)) if draws.random() < 0.5 else None
        try:
            plan = make_plan(MODEL, facts, replace(ONE, manual=manual))
        except InsufficientMemoryError:
            continue
        tried += 1
        assert sum(stage.weight_bytes for stage in plan.stages) == StageCosts.of(MODEL).weight_bytes(0, LAYERS)
        for stage in plan.stages:
            if stage.worker == "a":
                check_obeyed(placement, stage.device_layers)
            taken: dict[str, int] = {}
            for device in stage.devices:
                taken[device.device] = taken.get(device.device, 0) + device.bytes
                assert device.memory_bytes is not None and taken[device.device] <= device.memory_bytes, SEED
    assert tried > 5, SEED


def check_obeyed(placement: Placement, parts: tuple[DeviceLayers, ...]) -> None:
    for part in parts:
        for layer in range(part.start, part.end):
            said = placement.layers[layer]
            assert said in (None, "ram" if part.device == "cpu" else part.device), (SEED, layer, parts)
            in_ram = placement.experts_in_ram(layer) if layer else False  # the first layer has none
            if part.device != "cpu" and in_ram is not None:
                assert (layer in part.cpu_moe) == in_ram, (SEED, layer, parts)

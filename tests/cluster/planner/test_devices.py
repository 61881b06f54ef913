"""Tests of plans for workers with GPUs: the layers of each device, to the byte, and predicted speeds."""

from __future__ import annotations

import random
from dataclasses import fields, replace
from itertools import pairwise, product
from pathlib import Path

import pytest

from llamaclust.cluster.control.planning import with_gpus as add_gpus
from llamaclust.cluster.control.resources.resource_shares import WorkerResources, share_gpus
from llamaclust.cluster.planner.costs import GpuFacts, StageCosts, WorkerFacts
from llamaclust.cluster.planner.devices import devices_of
from llamaclust.cluster.planner.format import plan_json, plan_lines
from llamaclust.cluster.planner.memory import PlanRequest, StagePlace
from llamaclust.cluster.planner.plan import DevicePlan, HeldLayers, Plan
from llamaclust.cluster.planner.planner import make_plan
from llamaclust.cluster.planner.predict import predict_again
from llamaclust.cluster.planner.roofline import LAUNCHES_S
from llamaclust.core.errors import InsufficientMemoryError
from llamaclust.core.gpus import DeviceLayers, Gpu
from llamaclust.core.limits import StageLimits
from llamaclust.core.profile import Profile
from llamaclust.core.sizes import MIB
from llamaclust.kernels.cuda.backend import workspace_bytes
from llamaclust.model.loader import Model
from llamaclust.worker.devices.workspace import planned_workspace_bytes, weight_rounding_bytes
from llamaclust.worker.stage.stage_runner import model_program
from support.models.tiny_architectures import build_architecture
from support.plans.plan_inputs import REQUEST, SMALL, profile, split_by_hand, step_time, worker


def workspace(place: StagePlace) -> int:
    """Returns the workspace, which differs between a GPU and a processor."""
    return (9 if place.is_last else 3) * MIB if place.device != "cpu" else (7 if place.is_last else 4) * MIB


GPU_REQUEST: PlanRequest = replace(REQUEST, workspace=workspace, max_sequences=1)
CONTEXT = 1024 * 4096  # KV memory of a layer
STEPS = tuple(step_time(rows, 0.1 * rows, 5.0 * rows, 0.3) for rows in (1, 8, 128, 512))


def with_gpus(
    *memory_mib: int, gpu_layers: int | None = None, ram_mib: int = 10_000, name: str = "a", read: float | None = 400
) -> WorkerFacts:
    gpus = tuple(
        GpuFacts(f"cuda:{number}", mib * MIB, None if read is None else profile(read, 30_000))
        for number, mib in enumerate(memory_mib)
    )
    return replace(worker(name, ram_mib), gpus=gpus, gpu_layers=gpu_layers)


def devices(plan: Plan) -> list[tuple[str, int, int]]:
    (stage,) = plan.stages
    return [(one.device, one.start, one.end) for one in stage.devices]


def test_all_layers_go_to_a_gpu_that_has_room() -> None:
    plan = make_plan(SMALL, [with_gpus(1000)], GPU_REQUEST)
    assert devices(plan) == [("cuda:0", 0, 12)]
    (stage,) = plan.stages
    assert stage.memory_bytes == 11_000 * MIB
    assert stage.bytes == stage.devices[0].bytes == (160 + 9) * MIB + stage.kv_bytes
    assert plan.prediction is not None
    assert plan.prediction.token_s == pytest.approx(140 * MIB / 400e9 + 12 * LAUNCHES_S)
    assert stage.device_layers == (DeviceLayers("cuda:0", 0, 12),)


def test_what_does_not_fit_there_stays_in_ram() -> None:
    """The GPU takes the head and the last layers, to the byte; the embedding stays on the processor."""
    room = 20 * MIB + 9 * MIB + 5 * (10 * MIB + CONTEXT)
    facts = with_gpus(0)
    for free, layers in ((room, 5), (room - 1, 4)):
        gpu = replace(facts.gpus[0], memory_bytes=free)
        plan = make_plan(SMALL, [replace(facts, gpus=(gpu,))], GPU_REQUEST)
        assert devices(plan) == [("cpu", 0, 12 - layers), ("cuda:0", 12 - layers, 12)]
        cpu, gpu_part = plan.stages[0].devices
        assert cpu.workspace_bytes == 4 * MIB and gpu_part.workspace_bytes == 9 * MIB
        assert cpu.weight_bytes == 20 * MIB + (12 - layers) * 10 * MIB
        assert gpu_part.bytes <= free
    assert plan.prediction is not None
    seconds = 8 * 10 * MIB / 20e9 + (4 * 10 + 20) * MIB / 400e9 + 4 * LAUNCHES_S
    assert plan.prediction.token_s == pytest.approx(seconds)


@pytest.mark.parametrize(("gpu_layers", "on_gpu"), [(0, 0), (3, 3), (12, 12), (99, 12)])
def test_the_user_says_how_many(gpu_layers: int, on_gpu: int) -> None:
    plan = make_plan(SMALL, [with_gpus(1000, gpu_layers=gpu_layers)], GPU_REQUEST)
    wanted = [("cpu", 0, 12 - on_gpu), ("cuda:0", 12 - on_gpu, 12)]
    assert devices(plan) == [one for one in wanted if one[1] < one[2]]


def test_more_layers_than_fit_are_refused_with_what_is_missing() -> None:
    with pytest.raises(InsufficientMemoryError, match=r"a cuda:0 60.* MiB are missing"):
        make_plan(SMALL, [with_gpus(60, gpu_layers=12)], GPU_REQUEST)
    by_hand = replace(GPU_REQUEST, manual=split_by_hand(("a", 0, 12)))
    with pytest.raises(InsufficientMemoryError, match=r"layers \[0, 12\) on worker 'a cuda:0' need .*it has 60 MiB"):
        make_plan(SMALL, [with_gpus(60, gpu_layers=12)], by_hand)


def test_two_gpus_and_ram() -> None:
    plan = make_plan(SMALL, [with_gpus(60, 80)], GPU_REQUEST)
    found = devices(plan)
    assert [one[0] for one in found] == ["cpu", "cuda:0", "cuda:1"]
    assert found[0][1] == 0 and found[-1][2] == 12 and all(a[2] == b[1] for a, b in pairwise(found))
    for one in plan.stages[0].devices:
        assert one.memory_bytes is not None and one.bytes <= one.memory_bytes


def test_a_gpu_without_room_for_a_layer_is_left_out() -> None:
    assert devices(make_plan(SMALL, [with_gpus(5)], GPU_REQUEST)) == [("cpu", 0, 12)]


def test_random_clusters_keep_to_the_memory_of_every_device() -> None:
    assert sum(map(_is_planned_within_memory, range(30))) >= 10


def _is_planned_within_memory(seed: int) -> bool:
    """Checks a random cluster's plan, or returns False if there is none."""
    source = random.Random(seed)
    workers = [
        with_gpus(
            *(source.randrange(10, 150) for _ in range(source.randrange(3))),
            gpu_layers=source.choice([None, None, source.randrange(5)]),
            ram_mib=source.randrange(20, 300),
            name=f"w{number}",
        )
        for number in range(source.randrange(1, 5))
    ]
    request = replace(
        GPU_REQUEST, objective=source.choice(["latency", "throughput"]), max_sequences=source.choice([1, 8])
    )
    print(f"seed {seed}: {workers}")
    try:
        plan = make_plan(SMALL, workers, request)
    except InsufficientMemoryError:
        return False
    at = 0
    for stage in plan.stages:
        facts = next(one for one in workers if one.name == stage.worker)
        parts = stage.devices or (
            DevicePlan(device="cpu", **{held.name: getattr(stage, held.name) for held in fields(HeldLayers)}),
        )
        on_gpus = sum(part.end - part.start for part in parts if part.device != "cpu")
        assert facts.gpu_layers is None or on_gpus == min(facts.gpu_layers, stage.end - stage.start) or not facts.gpus
        for part in parts:
            assert part.start == at < part.end and part.bytes <= (part.memory_bytes or 0)
            assert part.weight_bytes == StageCosts.of(SMALL).weight_bytes(part.start, part.end)
            at = part.end
        assert stage.bytes == sum(part.bytes for part in parts)
    assert at == 12
    by_name = {facts.name: facts for facts in workers}
    again = predict_again(StageCosts.of(SMALL), plan, by_name, request.max_sequences, request.links)
    assert again == plan.prediction is not None
    return True


def test_nothing_is_predicted_of_a_device_that_is_absent_or_was_not_measured() -> None:
    plan = make_plan(SMALL, [with_gpus(60, 80)], GPU_REQUEST)
    for facts in ({}, {"a": with_gpus(60)}, {"a": with_gpus(60, 80, read=None)}):
        assert predict_again(StageCosts.of(SMALL), plan, facts, 1, GPU_REQUEST.links) is None


def test_a_worker_with_a_gpu_takes_what_slower_ones_would() -> None:
    plan = make_plan(SMALL, [worker("slow"), with_gpus(1000, name="fast")], GPU_REQUEST)
    assert [stage.worker for stage in plan.stages] == ["fast"]


@pytest.mark.parametrize("memory_mib", [(1000,), (500, 1000), (0, 1000)], ids=str)
def test_a_worker_that_lacks_only_measurements_of_its_gpus_is_used(memory_mib: tuple[int, ...]) -> None:
    """Speeds in the cluster file are those of processors, and new GPUs are not measured yet."""
    partly = with_gpus(*memory_mib, name="fast", read=None)
    plan = make_plan(SMALL, [worker("slow"), partly], GPU_REQUEST)
    assert [stage.worker for stage in plan.stages] == ["fast"] and plan.prediction is None
    plan = make_plan(SMALL, [worker("slow"), replace(partly, profile=None)], GPU_REQUEST)
    assert [stage.worker for stage in plan.stages] == ["slow"] and plan.prediction is not None


def test_the_plan_says_what_is_where() -> None:
    plan = make_plan(SMALL, [with_gpus(75)], GPU_REQUEST)
    lines = [line for line in plan_lines(plan) if line.startswith("    ")]
    assert [line.split(":")[0].strip() for line in lines] == ["cpu", "cuda"] and "of 75 MiB" in lines[1]
    first, second = plan_json(plan)["stages"][0]["devices"]
    assert (first["device"], second["device"], second["memory_bytes"]) == ("cpu", "cuda:0", 75 * MIB)


def resources(host: str, *gpus: Gpu, gpu_layers: int | None = None) -> WorkerResources:
    return WorkerResources(host, 1 << 30, gpus=gpus, gpu_layers=gpu_layers)


def test_workers_of_one_machine_share_a_gpu() -> None:
    gpu, other = Gpu("cuda:0", "X", 100, 90), Gpu("cuda:1", "X", 100, 80)
    workers = {"a": resources("here", gpu, other), "b": resources("here", gpu), "c": resources("there", gpu)}
    free = {name: [gpu.free_bytes for gpu in worker.gpus] for name, worker in share_gpus(workers).items()}
    assert free == {"a": [45, 80], "b": [45], "c": [90]}


def test_a_gpu_is_known_by_its_identity_not_by_its_number() -> None:
    """Ray gives each actor its own GPUs, all of which are cuda:0 there."""
    workers = {
        name: resources("here", Gpu(device, "X", 100, 90, uuid))
        for name, device, uuid in (("a", "cuda:0", "1"), ("b", "cuda:0", "2"), ("c", "cuda:1", "2"))
    }
    shared = share_gpus(workers)
    assert [shared[name].gpus[0].free_bytes for name in "abc"] == [90, 45, 45]


def test_speeds_come_from_measurements_of_as_many_gpus() -> None:
    facts, gpus = worker("a"), resources("here", Gpu("cuda:0", "X", 100, 90), gpu_layers=4)
    gpu = profile(900.0, 70_000.0, STEPS)
    measured = Profile(profile(), (gpu,))
    known = add_gpus(facts, gpus, measured)
    assert known.gpus == (GpuFacts("cuda:0", 90, gpu),) and known.gpu_layers == 4
    assert add_gpus(facts, gpus, replace(measured, gpus=())).gpus == (GpuFacts("cuda:0", 90),)


def test_what_steps_took_on_a_gpu_is_what_a_plan_predicts() -> None:
    """The GPU holds 5 of the plan's 12 layers and has measured steps; the others are predicted by bandwidth."""
    one = with_gpus(1000, gpu_layers=5)
    tried = replace(one, gpus=(replace(one.gpus[0], profile=profile(400, 30_000, STEPS)),))
    processor, gpu = devices_of(tried)
    costs = StageCosts.of(SMALL)
    assert 1e3 * costs.decode_s(gpu, 7, 12) == pytest.approx(0.1 + 5 * 10 * MIB / 1e9 * 5.0 + 0.3)
    assert 1e3 * costs.prefill_s(gpu, 7, 12, 512, concurrent=True) == pytest.approx(51.2 + 5 * 10 * MIB / 1e9 * 2560)
    plan = make_plan(SMALL, [tried], GPU_REQUEST)
    assert plan.prediction is not None
    both = costs.decode_s(processor, 0, 7) + costs.decode_s(gpu, 7, 12)
    assert plan.prediction.token_s == pytest.approx(both)


@pytest.mark.parametrize("objective", ["latency", "throughput"])
def test_layers_stay_on_a_gpu_rather_than_room_for_more_contexts(objective: str) -> None:
    """The GPU has room for all layers with one context, or half of them with four."""
    request = replace(GPU_REQUEST, max_sequences=8, objective=objective)
    plan = make_plan(SMALL, [with_gpus(250), worker("b", 10_000)], request)
    assert devices(plan) == [("cuda:0", 0, 12)] and plan.kv_blocks >= 64
    roomy = make_plan(SMALL, [with_gpus(400), worker("b", 10_000)], request)
    assert devices(roomy) == [("cuda:0", 0, 12)] and roomy.kv_blocks > 2 * 64


def test_a_gpu_has_room_for_what_rounding_adds_to_any_number_of_kv_blocks(tmp_path: Path) -> None:
    """The table of window blocks fits as well; plans are made before these numbers are known."""
    model = Model.open(build_architecture(tmp_path / "m.gguf", "gemma3"))
    limits = StageLimits(max_batch_tokens=544, max_outputs=64, max_sequences=8, max_context_tokens=2048, kv_blocks=1)
    promised = planned_workspace_bytes(model, 0, model.layer_count, limits, 1, "cuda:0")
    rounding = weight_rounding_bytes(model, 0, model.layer_count, "cuda:0")
    for blocks, window_blocks in product((1, 73, 74, 75, 999), (0, 74, 75)):
        given = replace(limits, kv_blocks=blocks, window_blocks=window_blocks)
        program = model_program(model, 0, model.layer_count, given)
        assert workspace_bytes(program, model.tensors_for(program), given) <= promised + rounding


@pytest.mark.parametrize(("gpus_mib", "kv_mib"), [((), 15.75), ((400,), 15.75), ((120, 120), 16.5)], ids=str)
def test_kv_memory_is_a_limit_of_each_device(gpus_mib: tuple[int, ...], kv_mib: float) -> None:
    request = replace(GPU_REQUEST, context_length=256, kv_memory_bytes=16 * MIB)
    (stage,) = make_plan(SMALL, [with_gpus(*gpus_mib)], request).stages
    assert all(part.kv_bytes <= 16 * MIB for part in stage.devices)
    assert stage.kv_bytes == kv_mib * MIB

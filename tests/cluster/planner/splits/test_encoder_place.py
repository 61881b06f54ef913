"""Tests which worker holds the encoder of images, and the memory that it takes there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest

from llamaclust.cluster.planner.costs import GpuFacts, WorkerFacts
from llamaclust.cluster.planner.format import plan_json, plan_lines
from llamaclust.cluster.planner.manual import Assignment
from llamaclust.cluster.planner.memory import PlanRequest
from llamaclust.cluster.planner.plan import Plan
from llamaclust.cluster.planner.planner import make_plan
from llamaclust.cluster.planner.splits.encoder_place import plan_with_encoder
from llamaclust.core.errors import InsufficientMemoryError
from llamaclust.core.sizes import MIB
from support.plans.plan_inputs import REQUEST, SMALL, profile, reach, split_by_hand
from support.plans.plan_inputs import worker as near_worker

ENCODER = {"weights": 90 * MIB, "workspace": 10 * MIB}
ONE = replace(REQUEST, max_sequences=1)
ALONE = 12 * 10 + 2 * 20 + 48 + 8  # MiB of all layers on one worker, with KV memory for one sequence


def worker(name: str, memory_mib: int | None, read: float = 20) -> WorkerFacts:
    """Makes a worker on a slow network, where one stage is best."""
    return replace(near_worker(name, memory_mib, read), reach=reach(20.0))


def encoder(threads: int) -> Mapping[str, int]:
    return {**ENCODER, "workspace": threads * ENCODER["workspace"]}


def planned(workers: Sequence[WorkerFacts], request: PlanRequest = ONE, mib: int | None = None) -> Plan:
    own = encoder if mib is None else lambda threads: {"weights": mib * MIB, "workspace": 0}

    def make(workers: Sequence[WorkerFacts], by_hand: tuple[Assignment, ...] | None = None) -> Plan:
        return make_plan(SMALL, workers, request if by_hand is None else replace(request, manual=by_hand))

    return plan_with_encoder(own, workers, make, is_manual=request.manual is not None)


def holder(plan: Plan) -> str:
    (stage,) = (stage for stage in plan.stages if stage.encoder_bytes)
    assert stage.memory_bytes is None or stage.bytes <= stage.memory_bytes
    return stage.worker


def test_the_worker_with_most_memory_among_those_with_layers_holds_it() -> None:
    plan = planned([worker("a", 200), worker("b", 290)])
    assert holder(plan) == "b" and len(plan.stages) == 2
    (stage,) = (stage for stage in plan.stages if stage.worker == "b")
    assert (stage.encoder_bytes, stage.memory_bytes) == (100 * MIB, 290 * MIB)
    assert stage.bytes == stage.weight_bytes + stage.kv_bytes + stage.workspace_bytes + 100 * MIB
    assert holder(planned([worker("a", 200), worker("b", 200)])) == "a", "of equal ones the first of the file"


def test_a_worker_without_layers_does_not_hold_it() -> None:
    """Otherwise an answer would depend on one more machine."""
    plan = planned([worker("fast", 1000), worker("large", 4000, read=1)])
    assert holder(plan) == "fast" and [idle.worker for idle in plan.idle_workers] == ["large"]


def test_layers_give_way_to_it() -> None:
    alone = make_plan(SMALL, [worker("a", 300), worker("b", 200)], ONE)
    assert [stage.worker for stage in alone.stages] == ["a"]
    plan = planned([worker("a", 300), worker("b", 200)])
    assert holder(plan) == "a" and [stage.worker for stage in plan.stages] == ["a", "b"]


def test_a_worker_gets_a_layer_where_the_best_plans_leave_the_encoder_alone() -> None:
    """The worker with the encoder would have no layers in the best plans."""
    plan = planned([worker("a", 290), worker("b", 290), worker("c", 100)])
    assert [(stage.worker, stage.start, stage.end) for stage in plan.stages] == [("a", 0, 1), ("b", 1, 12)]
    assert holder(plan) == "a" and plan.objective == "latency" and [idle.worker for idle in plan.idle_workers] == ["c"]
    fast, slow = worker("fast", ALONE + 5), worker("slow", 1000, read=10)
    plan = planned([fast, slow], mib=ALONE)
    assert holder(plan) == "slow" and [(stage.worker, stage.start) for stage in plan.stages] == [
        ("slow", 0),
        ("fast", 1),
    ]
    apart = replace(ONE, partitions=frozenset({frozenset(("a", "b"))}))
    with pytest.raises(InsufficientMemoryError, match="the encoder of images does not fit"):
        planned([worker("a", 290), worker("b", 290)], apart)


def test_of_equal_workers_another_one_does_not_take_the_layers() -> None:
    """`b` would be better for all layers if `a` held the encoder: `b` has memory for more sequences."""
    several, equal = replace(ONE, max_sequences=4), [worker("a", 420), worker("b", 420)]
    best = make_plan(SMALL, [worker("a", 320), worker("b", 420)], several)
    assert [stage.worker for stage in best.stages] == ["b"]
    plan = planned(equal, several)
    assert holder(plan) == "a" and len(plan.stages) == 1 and [idle.worker for idle in plan.idle_workers] == ["b"]


def test_one_worker_is_preferred_to_two_that_are_not_faster() -> None:
    """`a` is best without the encoder; with it, `a` needs `b`, which has room for all."""
    plan = planned([worker("a", 300), worker("b", 340)])
    assert holder(plan) == "b" and len(plan.stages) == 1 and plan.objective == "latency"


def test_a_faster_plan_is_preferred_to_more_memory() -> None:
    plan = planned([worker("large", 350, read=2), worker("fast", 320), worker("other", 300)])
    assert holder(plan) == "fast" and len(plan.stages) == 1


def test_by_hand_the_stage_with_most_room_holds_it() -> None:
    manual = split_by_hand(("a", 0, 9), ("b", 9, 12))
    workers = [worker("a", 260), worker("b", 250), worker("c", 4000)]
    plan = planned(workers, replace(ONE, manual=manual))
    assert holder(plan) == "b" and [(stage.start, stage.end) for stage in plan.stages] == [(0, 9), (9, 12)]


def test_it_is_in_the_ram_of_a_worker_with_gpus() -> None:
    gpu = replace(worker("g", 150), gpus=(GpuFacts("cuda:0", 1 << 30, profile(500, 50_000)),))
    plan = planned([gpu])
    (stage,) = plan.stages
    assert stage.encoder_bytes == 100 * MIB and [part.device for part in stage.devices] == ["cuda:0"]
    assert stage.memory_bytes == (1 << 30) + 150 * MIB
    with pytest.raises(InsufficientMemoryError, match="needs 100 MiB"):
        planned([replace(gpu, memory_bytes=99 * MIB)])


def test_unknown_memory_suffices() -> None:
    plan = planned([worker("a", None), worker("b", None)])
    assert holder(plan) == "a" and plan.stages[0].memory_bytes is None


def test_too_little_memory_is_refused_with_the_numbers() -> None:
    workers = [replace(worker("a", 130), threads=2), replace(worker("b", 130), threads=2)]
    message = (
        r"the encoder of images does not fit: one worker needs 110 MiB \(weights 90, workspace 20\) in addition "
        r"to layers; the workers have, in MiB: a 130, b 130\. Give one of them more memory, or set mmproj: off$"
    )
    with pytest.raises(InsufficientMemoryError, match=message):
        planned(workers)
    with pytest.raises(InsufficientMemoryError, match=r"the model does not fit.*encoder of images needs 100 MiB") as e:
        planned([worker("a", 60)])
    assert e.value.missing_bytes


def test_the_plan_shows_it() -> None:
    plan = planned([worker("a", 400), worker("b", 200, read=1)])
    (line,) = (line for line in plan_lines(plan) if line.startswith("  a: "))
    total = plan.stages[0].bytes // MIB
    assert f"MiB workspace + 100 MiB encoder = {total} of 400 MiB" in line
    (stage,) = plan_json(plan)["stages"]
    assert stage["encoder_bytes"] == 100 * MIB
    assert "encoder" not in "".join(plan_lines(make_plan(SMALL, [worker("a", 400)], ONE)))

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable
from dataclasses import replace

import pytest

from llamaclust.cluster.planner.format import plan_json, plan_lines
from llamaclust.cluster.planner.links import COORDINATOR, Links
from llamaclust.cluster.planner.plan import IdleWorker, Plan, Prediction
from llamaclust.cluster.planner.planner import make_plan
from llamaclust.core.errors import InsufficientMemoryError, UsageError
from llamaclust.core.sizes import MIB
from llamaclust.model.costs import LayerCost, ModelCosts
from support.plans.plan_inputs import LAYER, REQUEST, SMALL, link, split_by_hand, worker

DEMO = ModelCosts(  # SmolLM2-135M in Q4_1
    30_000_000, 30_000_000, 28_311_552, (LayerCost(2_217_600, 3_538_944, 768),) * 30
)


def links(one_way_ms: float, names: str = "ab") -> Links:
    ends = [COORDINATOR, *names]
    return Links({frozenset(pair): link(one_way_ms) for pair in itertools.combinations(ends, 2)})


AT_HALF_A_MS = links(0.5)


def predicted(plan: Plan) -> Prediction:
    assert plan.prediction is not None
    return plan.prediction


def layers(plan: Plan) -> list[tuple[str, int, int]]:
    return [(stage.worker, stage.start, stage.end) for stage in plan.stages]


@pytest.mark.parametrize("measured", [True, False])
def test_the_demo_gives_both_workers_half(measured: bool) -> None:
    workers = [worker(name, read=20 if measured else None) for name in "ab"]
    plan = make_plan(DEMO, workers, replace(REQUEST, context_length=4096, max_sequences=32))
    (a, b) = plan.stages
    assert (a.start, b.end) == (0, 30) and a.end == b.start
    assert 15 <= a.end <= 17
    assert plan.idle_workers == ()
    assert (plan.prediction is not None) == measured
    predicted = next(line for line in plan_lines(plan) if "predicted: " in line)
    assert "bottleneck: ?" not in predicted if measured else "predicted: ? ms/token" in predicted
    assert ("?: not measured yet" in plan_lines(plan)[-1]) == (not measured)


def test_predictions_follow_the_measurements() -> None:
    plan = make_plan(SMALL, [worker("a"), worker("b")], replace(REQUEST, links=AT_HALF_A_MS))
    read_ms = (12 * 10 + 20) * MIB / 20e9 * 1e3
    found = predicted(plan)
    assert 1e3 * found.token_s == pytest.approx(read_ms + 2 * 0.5)
    assert 1e3 * sum(stage.decode_s for stage in found.stages) == pytest.approx(read_ms)
    macs_ms = 12 * 20e6 / 300e9 * 1e3
    assert 1e3 * sum(stage.prefill_s for stage in found.stages) == pytest.approx(macs_ms)
    assert 512 * macs_ms / 2 < 1e3 * found.ttft_s < 512 * macs_ms
    assert found.tokens_per_s == pytest.approx(8e3 / (read_ms + 1.0), rel=0.01)
    faster = make_plan(
        SMALL, [worker("a", read=40, int8=600), worker("b", read=40, int8=600)], replace(REQUEST, links=links(0.0))
    )
    assert 1e3 * predicted(faster).token_s == pytest.approx(read_ms / 2)


def test_slow_workers_are_spares_for_latency_but_not_for_throughput() -> None:
    workers = [worker("slow", read=15, int8=200), worker("fast", read=40, int8=600), worker("same", read=38, int8=580)]
    plan = make_plan(SMALL, workers, REQUEST)
    assert {stage.worker for stage in plan.stages} == {"fast", "same"}
    assert [idle.worker for idle in plan.idle_workers] == ["slow"]
    assert "  slow: not used: with this worker, the plan would be slower" in plan_lines(plan)
    plan = make_plan(SMALL, workers, replace(REQUEST, objective="throughput"))
    assert {stage.worker for stage in plan.stages} == {"slow", "fast", "same"}
    assert min(plan.stages, key=lambda stage: stage.end - stage.start).worker == "slow"


def test_memory_uses_workers_that_speed_would_leave_out() -> None:
    workers = [worker("slow", read=5, int8=75), worker("fast", memory_mib=100, read=40, int8=600)]
    plan = make_plan(SMALL, workers, REQUEST)
    assert plan.idle_workers == ()
    assert all(stage.bytes <= (stage.memory_bytes or 0) for stage in plan.stages)


def test_the_order_changes_only_where_it_must() -> None:
    tiny, big = worker("tiny", memory_mib=24), worker("big")
    assert [stage.worker for stage in make_plan(SMALL, [big, worker("b")], REQUEST).stages] == ["big", "b"]
    no_head = ModelCosts(100 * MIB, MIB, 1, (replace(LAYER, weight_bytes=MIB),) * 12)
    plan = make_plan(
        no_head, [tiny, worker("big", memory_mib=120)], replace(REQUEST, context_length=16, max_sequences=1)
    )
    assert [stage.worker for stage in plan.stages] == ["big", "tiny"]


def test_plans_cover_all_layers_and_keep_to_memory() -> None:
    assert sum(map(_is_planned_within_memory, range(40))) >= 20


def _is_planned_within_memory(seed: int) -> bool:
    """Checks the plan for random workers, or returns False if there is none."""
    print(f"seed {seed}")
    random_ = random.Random(seed)
    workers = [
        worker(f"w{i}", random_.choice([60, 100, 200, 1000]), random_.choice([5, 20, 40]), random_.choice([100, 500]))
        for i in range(random_.randint(1, 12))
    ]
    request = replace(
        REQUEST, objective=random_.choice(["latency", "throughput"]), context_length=random_.choice([16, 1024, 8192])
    )
    try:
        plan = make_plan(SMALL, workers, request)
    except InsufficientMemoryError as error:
        assert "MiB are missing" in str(error)
        return False
    assert layers(plan)[0][1] == 0 and layers(plan)[-1][2] == 12
    assert all(before.end == after.start for before, after in itertools.pairwise(plan.stages))
    assert all(stage.start < stage.end and stage.bytes <= (stage.memory_bytes or 0) for stage in plan.stages)
    assert {stage.worker for stage in plan.stages} | {idle.worker for idle in plan.idle_workers} == {
        facts.name for facts in workers
    }
    assert (
        -(-request.context_length // 16) <= plan.kv_blocks <= request.max_sequences * -(-request.context_length // 16)
    )
    return True


def test_more_workers_than_layers() -> None:
    plan = make_plan(SMALL, [worker(f"w{i}") for i in range(20)], REQUEST)
    assert len(plan.stages) == 12 and len(plan.idle_workers) == 8
    assert {idle.reason for idle in plan.idle_workers} == {"the model has 12 layers, one for each of the other workers"}


WINDOWED = replace(SMALL, layers=(LAYER, replace(LAYER, window=1000, window_bytes_per_token=4096)) * 6)


def test_layers_with_a_window_are_planned_with_that_much_kv_memory() -> None:
    request = replace(REQUEST, context_length=8192, max_batch_tokens=544)
    assert make_plan(SMALL, [worker("a")], request).window_blocks == 0
    plan = make_plan(WINDOWED, [worker("a", memory_mib=None)], request)
    most = 8 * 66 + 34  # (1000 + 13) // 16 + 3 for each sequence, and the rows of a microbatch
    assert (plan.kv_blocks, plan.window_blocks) == (8 * 512, most)
    assert plan.stages[0].kv_bytes == 6 * 4096 * 16 * (8 * 512 + most)
    assert make_plan(WINDOWED, [worker("a", memory_mib=None)], replace(request, context_length=1024)).window_blocks == 0
    for given in (300, 411):
        plan = make_plan(WINDOWED, [worker("a")], replace(request, kv_memory_bytes=given * MIB))
        assert plan.window_blocks == min(most, 128 - (-4 * (plan.kv_blocks - 512) * 66 // 512) + 34)
        assert plan.stages[0].kv_bytes == 6 * 4096 * 16 * (plan.kv_blocks + plan.window_blocks)
        assert 0 <= given * MIB - plan.stages[0].kv_bytes < 6 * 4096 * 16 * 2
    alone = replace(WINDOWED, layers=WINDOWED.layers[1:2] * 12)
    plan = make_plan(alone, [worker("a")], replace(request, kv_memory_bytes=4000 * MIB))
    assert (plan.kv_blocks, plan.window_blocks) == (8 * 512, most), "no more than all sequences can use"
    with pytest.raises(InsufficientMemoryError, match="KV memory"):
        make_plan(WINDOWED, [worker("a")], replace(request, kv_memory_bytes=200 * MIB))


def test_kv_memory() -> None:
    plan = make_plan(SMALL, [worker("a", memory_mib=None)], REQUEST)
    assert plan.kv_blocks == 8 * 1024 // 16
    plan = make_plan(SMALL, [worker("a", memory_mib=300)], REQUEST)
    left = 300 - 160 - 8
    assert plan.kv_blocks == max(left // 2, 48) * MIB // (12 * 4096 * 16)
    plan = make_plan(SMALL, [worker("a", memory_mib=300)], replace(REQUEST, kv_memory_bytes=100 * MIB))
    assert plan.kv_blocks == 100 * MIB // (12 * 4096 * 16)
    with pytest.raises(InsufficientMemoryError, match=r"KV memory 48\), kv_memory is 10 MiB: 38 MiB are missing"):
        make_plan(SMALL, [worker("a")], replace(REQUEST, kv_memory_bytes=10 * MIB, manual=split_by_hand(("a", 0, 12))))


def test_what_does_not_fit_says_how_much_is_missing() -> None:
    workers = [worker("a", memory_mib=120), worker("b", memory_mib=110)]
    with pytest.raises(InsufficientMemoryError) as caught:
        make_plan(SMALL, workers, replace(REQUEST, context_length=4096))
    message = str(caught.value)
    assert "needs 352 MiB (weights 160, KV memory 192) for 4096 tokens" in message
    assert "in MiB: a 120, b 110" in message and caught.value.exit_code == 3
    least = 160 + 192 + 5 + 8 - 230
    missing = int(message.split("; ")[-1].split()[0])
    assert least <= missing <= least + 20
    longest = int(message.split("context_length to ")[1].split()[0])
    make_plan(SMALL, workers, replace(REQUEST, context_length=longest))
    with pytest.raises(InsufficientMemoryError):
        make_plan(SMALL, workers, replace(REQUEST, context_length=longest + 512))
    with pytest.raises(InsufficientMemoryError, match="take a smaller model"):
        make_plan(SMALL, [worker("a", memory_mib=20)], REQUEST)


def test_plans_by_hand() -> None:
    workers = [worker("a"), worker("b"), worker("c")]
    plan = make_plan(SMALL, workers, replace(REQUEST, manual=split_by_hand(("c", 7, 12), ("a", 0, 7))))
    assert layers(plan) == [("a", 0, 7), ("c", 7, 12)]
    assert plan.idle_workers == (IdleWorker("b", "the manual plan does not name this worker"),)
    assert plan.prediction is not None


@pytest.mark.parametrize(
    ("manual", "message"),
    [
        (
            (("a", 0, 7), ("b", 6, 12)),
            "layers [6, 7) of worker 'b' are assigned twice; worker 'a' has [0, 7)",
        ),
        (
            (("b", 2, 3), ("a", 0, 12)),
            "layers [2, 3) of worker 'b' are assigned twice; worker 'a' has [0, 12)",
        ),
        ((("a", 0, 5), ("b", 6, 12)), "layers [5, 6) are on no worker; the model has layers [0, 12)"),
        ((("a", 0, 5), ("b", 5, 11)), "layers [11, 12) are on no worker; the model has layers [0, 12)"),
        ((("a", 1, 12),), "layers [0, 1) are on no worker; the model has layers [0, 12)"),
        ((("a", 0, 13),), "worker 'a' cannot have layers [0, 13), because the model has layers [0, 12)"),
        ((("a", 0, 5), ("b", 5, 5)), "worker 'b' cannot have layers [5, 5), because the range is empty"),
        ((("x", 0, 12),), "unknown worker 'x'; the workers are a, b"),
        ((("a", 0, 5), ("a", 5, 12)), "worker 'a' has layers [0, 5) and [5, 12); give each worker one range"),
    ],
)
def test_wrong_plans_by_hand_are_refused(manual: tuple[tuple[str, int, int], ...], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        make_plan(SMALL, [worker("a"), worker("b")], replace(REQUEST, manual=split_by_hand(*manual)))
    assert (str(caught.value), caught.value.exit_code) == (f"plan: {message}", 2)


def test_a_plan_by_hand_that_does_not_fit_names_the_mib_of_every_worker() -> None:
    workers = [worker("a", memory_mib=100), worker("b", memory_mib=40), worker("c")]
    by_hand = split_by_hand(("a", 0, 10), ("b", 10, 11), ("c", 11, 12))
    with pytest.raises(InsufficientMemoryError) as caught:
        make_plan(SMALL, workers, replace(REQUEST, manual=by_hand, context_length=8192))
    assert caught.value.exit_code == 3
    assert str(caught.value) == (
        "the plan does not fit for 8192 tokens of context: "
        "layers [0, 10) on worker 'a' need 445 MiB (weights 120, KV memory 320, workspace 5), it has 100 MiB: "
        "345 MiB are missing; "
        "layers [10, 11) on worker 'b' need 47 MiB (weights 10, KV memory 32, workspace 5), it has 40 MiB: "
        "7 MiB are missing; change the layers, or give more memory"
    )


def test_a_worker_with_too_little_memory_is_not_called_slow() -> None:
    workers = [worker("fast", memory_mib=10, read=80, int8=900), worker("a"), worker("b")]
    for objective in ("latency", "throughput"):
        plan = make_plan(SMALL, workers, replace(REQUEST, objective=objective))
        assert [stage.worker for stage in plan.stages] == ["a", "b"]
        assert plan.idle_workers == (
            IdleWorker("fast", "too little memory: it has 10 MiB, a stage of one layer needs 31 MiB"),
        )


def test_a_worker_that_holds_a_layer_but_neither_end_of_the_model_is_not_called_slow() -> None:
    workers = [worker("fast", memory_mib=32, read=80, int8=900), worker("a"), worker("slow", read=5, int8=75)]
    plan = make_plan(SMALL, workers, REQUEST)
    assert [stage.worker for stage in plan.stages] == ["a"]
    assert plan.idle_workers == (
        IdleWorker("fast", "too little memory: it has 32 MiB, a stage of one layer needs 51 MiB"),
        IdleWorker("slow", "with this worker, the plan would be slower"),
    )


def test_a_worker_that_can_hold_nothing_does_not_keep_others_from_being_spares() -> None:
    workers = [worker("none", memory_mib=10, read=80, int8=900), worker("fast"), worker("slow", read=5, int8=75)]
    plan = make_plan(SMALL, workers, REQUEST)
    assert [stage.worker for stage in plan.stages] == ["fast"]


def test_workspace_grows_with_the_threads_of_a_worker() -> None:
    workers = [replace(worker("a"), threads=3), worker("b")]
    plan = make_plan(SMALL, workers, replace(REQUEST, manual=split_by_hand(("a", 0, 6), ("b", 6, 12))))
    assert [stage.workspace_bytes for stage in plan.stages] == [7 * MIB, 8 * MIB]
    with pytest.raises(InsufficientMemoryError, match="up to 10 MiB of workspace a worker"):
        make_plan(SMALL, [replace(one, memory_bytes=MIB) for one in workers], REQUEST)


def test_large_clusters_are_planned_quickly() -> None:
    large = ModelCosts(500 * MIB, 500 * MIB, 10**9, (LAYER,) * 80)
    workers = [worker(f"w{i}", read=20 + i % 3, int8=300) for i in range(40)]
    plan = make_plan(large, workers, replace(REQUEST, objective="throughput"))
    assert plan.stages[-1].end == 80


@pytest.mark.parametrize("unmeasured", ["a", "b", "bc"])
def test_workers_that_are_not_measured_are_used_where_the_others_do_not_suffice(unmeasured: str) -> None:
    def used(memory_mib: int) -> set[str]:
        workers = [worker(name, memory_mib, read=None if name in unmeasured else 20) for name in "abc"]
        return {stage.worker for stage in make_plan(SMALL, workers, REQUEST).stages}

    assert not used(10_000) & {*unmeasured}
    least = next(memory_mib for memory_mib in range(10, 10_000, 10) if _fits(used, memory_mib))
    assert used(least) & {*unmeasured}


@pytest.mark.parametrize("unmeasured", "abc")
def test_workers_that_are_not_measured_are_used_where_the_others_cannot_reach_each_other(unmeasured: str) -> None:
    """Any two of the three workers can hold the model."""
    measured = {*"abc"} - {unmeasured}
    workers = [worker(name, 130, read=None if name == unmeasured else 20) for name in "abc"]
    assert {stage.worker for stage in make_plan(SMALL, workers, REQUEST).stages} == measured
    apart = replace(REQUEST, partitions=frozenset({frozenset(measured)}))
    stages = make_plan(SMALL, workers, apart).stages
    assert unmeasured in {stage.worker for stage in stages} and len(stages) == 2


def _fits(used: Callable[[int], set[str]], memory_mib: int) -> bool:
    try:
        return bool(used(memory_mib))
    except InsufficientMemoryError:
        return False


@pytest.mark.parametrize(("context", "prompt"), [(128, 128), (1024, 512)])
@pytest.mark.parametrize("measured", [True, False])
def test_the_prompt_of_a_prediction_fits_in_the_context(context: int, prompt: int, measured: bool) -> None:
    workers = [worker(name, read=20 if measured else None) for name in "ab"]
    plan = make_plan(SMALL, workers, replace(REQUEST, context_length=context))
    assert any(f"first token of a {prompt}-token prompt after" in line for line in plan_lines(plan))
    assert plan_json(plan)["prompt_tokens"] == prompt
    rows_ms = plan_json(plan)["stages"][0]["prefill_ms"]
    assert (rows_ms is not None) == measured


@pytest.mark.parametrize("measured", [True, False])
def test_every_figure_of_a_plan_is_in_its_json(measured: bool) -> None:
    workers = [worker(name, read=20 if measured else None) for name in "ab"]
    values = json.loads(json.dumps(plan_json(make_plan(SMALL, workers, REQUEST))))
    predicted_keys = {"token_ms", "links_ms", "gathers_ms", "ttft_ms", "tokens_per_s", "bottleneck", "speculation"}
    assert values.keys() == predicted_keys | {
        "stages", "kv_blocks", "window_blocks", "state_blocks", "context_length", "context",
        "idle_workers", "optimality_gap", "unused_gpus", "prompt_tokens", "wide_tiles", "without_groups",
        "objective", "rejected_group", "no_group", "no_images",
    }  # fmt: skip
    assert values["stages"][0].keys() == {
        "worker", "start", "end", "weight_bytes", "touched_bytes", "kv_bytes", "workspace_bytes", "memory_bytes",
        "decode_ms", "prefill_ms", "gathers_ms", "devices", "shares", "member", "encoder_bytes",
    }  # fmt: skip
    assert all((values[key] is not None) == measured for key in predicted_keys)

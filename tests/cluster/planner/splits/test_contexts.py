"""Tests the default context length: the choice by memory, its stability, and that nothing is refused for it."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise

import pytest

from llamaclust.cluster.planner.context import ContextBound, ContextBounds, ContextChoice
from llamaclust.cluster.planner.costs import GpuFacts, WorkerFacts
from llamaclust.cluster.planner.explain import other_models_error
from llamaclust.cluster.planner.format import plan_json, plan_lines
from llamaclust.cluster.planner.memory import PlanRequest, StagePlace
from llamaclust.cluster.planner.plan import Plan
from llamaclust.cluster.planner.planner import make_plan
from llamaclust.core.errors import InsufficientMemoryError
from llamaclust.core.sizes import MIB, mib
from llamaclust.model.costs import LayerCost, ModelCosts
from support.plans.plan_inputs import SMALL, profile, worker
from support.seed import SEED

LEAST, TRAINED = 4096, 131_072
BOUNDS = ContextBounds(LEAST, TRAINED, TRAINED)


def workspace(place: StagePlace) -> int:
    """Returns bytes that grow with the context, as tables of positions do."""
    return (7 if place.is_last else 4) * MIB + 600 * place.context_length


FIXED = PlanRequest(LEAST, 32, workspace, kv_tokens=8192)
CHOSEN = replace(FIXED, context_bounds=BOUNDS)


def layers_of(plan: Plan) -> list[object]:
    return [(stage.worker, stage.start, stage.end, stage.device_layers) for stage in plan.stages]


def random_costs(source: random.Random) -> ModelCosts:
    kv_bytes = source.choice([512, 4096, 16_384])
    has_window, has_state = source.random() < 0.3, source.random() < 0.2
    window = source.choice([128, 1024, 4096]) if has_window else None
    layer = LayerCost(
        source.choice([5, 40]) * MIB,
        10**7,
        kv_bytes,
        state_bytes=source.choice([1, 8]) * MIB // 4 if has_state else 0,
        window=window,
        window_bytes_per_token=kv_bytes if has_window else 0,
    )
    others = (replace(layer, window=None, window_bytes_per_token=0),) * source.randrange(1, 6)
    return ModelCosts(20 * MIB, 20 * MIB, 3 * 10**7, (layer,) * source.randrange(2, 20) + others)


def random_worker(source: random.Random, name: str) -> WorkerFacts:
    gpus = source.randrange(3) if source.random() < 0.4 else 0
    return replace(
        worker(name, source.randrange(100, 2000), read=source.choice([10, 60])),
        gpus=tuple(
            GpuFacts(f"cuda:{number}", source.randrange(50, 1500) * MIB, profile(400, 5000)) for number in range(gpus)
        ),
    )


def test_what_runs_with_the_shortest_context_runs_with_the_chosen_one_in_the_same_layers() -> None:
    source, planned = random.Random(SEED), 0
    for _ in range(60):
        costs = random_costs(source)
        workers = [random_worker(source, name) for name in "abcd"[: source.randrange(1, 5)]]
        keys = {
            "objective": source.choice(["latency", "throughput"]),
            "kv_memory_bytes": source.choice([None, None, 300 * MIB]),
            "max_batch_tokens": 544,
        }
        fixed, chosen = (replace(request, **keys) for request in (FIXED, CHOSEN))  # type: ignore[arg-type]
        try:
            before = make_plan(costs, workers, fixed)
        except InsufficientMemoryError as refused:
            with pytest.raises(InsufficientMemoryError) as again:
                make_plan(costs, workers, chosen)
            assert str(again.value) == str(refused)
            continue
        planned += 1
        plan = make_plan(costs, workers, chosen)
        assert layers_of(plan) == layers_of(before) and plan.least_kv_blocks == before.kv_blocks
        assert LEAST <= plan.context_length <= min(TRAINED, 16 * plan.kv_blocks)
        assert plan.window_blocks >= before.window_blocks or plan.window_blocks == 0
        assert plan.context.missing_bytes > 0 or plan.context_length == TRAINED
        for part in (part for stage in plan.stages for part in (stage.devices or (stage,))):
            assert part.memory_bytes is None or part.bytes <= part.memory_bytes
    assert planned >= 20


def test_more_memory_never_means_a_shorter_context() -> None:
    sizes = (4000, 5000, 6000, 9000, 17_000, 40_000, 200_000)
    for costs in (SMALL, random_costs(random.Random(SEED))):
        plans = [make_plan(costs, [worker("a", mib)], CHOSEN) for mib in sizes]
        lengths = [plan.context_length for plan in plans]
        assert all(one <= two for one, two in pairwise(lengths)) and lengths[-1] == TRAINED, lengths
        assert all(one.context.missing_bytes >= two.context.missing_bytes for one, two in pairwise(plans))


def test_the_missing_memory_is_exactly_what_the_longest_context_lacks() -> None:
    plan = make_plan(SMALL, [worker("a", 2000)], CHOSEN)
    enough = 2000 * MIB + plan.context.missing_bytes
    roomy, short = (replace(worker("a"), memory_bytes=each) for each in (enough, enough - 1))
    assert make_plan(SMALL, [roomy], CHOSEN).context_length == TRAINED
    assert make_plan(SMALL, [short], CHOSEN).context_length < TRAINED


def test_kv_memory_is_for_one_long_sequence_not_for_many() -> None:
    plan = make_plan(SMALL, [worker("a", 100_000)], CHOSEN)
    assert plan.context_length == TRAINED == 16 * plan.kv_blocks


@pytest.mark.parametrize("bounds", [ContextBounds(700, 700, 700), ContextBounds(4096, 4096, 8192, ContextBound.ROPE)])
def test_without_a_choice_the_context_is_the_only_one(bounds: ContextBounds) -> None:
    request = replace(FIXED, context_length=bounds.least, context_bounds=bounds)
    assert make_plan(SMALL, [worker("a", 100_000)], request).context_length == bounds.least


def test_a_context_that_was_chosen_is_kept_with_less_memory_as_long_as_any_plan_holds_it() -> None:
    every = [worker(name, 400, read=read) for name, read in (("a", 60), ("b", 20), ("c", 20))]
    first = make_plan(SMALL, every, replace(CHOSEN, objective="throughput"))
    kept = replace(CHOSEN, kept_context=first.context_length)
    assert first.context_length > LEAST
    fewer = make_plan(SMALL, [every[0], worker("b", 500)], kept)
    assert fewer.context_length == first.context_length and not fewer.lacks_kv_memory
    assert "lacks" not in fewer.context.text
    # The plan for the shortest context would take one worker, which is fast, and has no room for a longer context.
    alone = make_plan(SMALL, [replace(every[0], memory_bytes=300 * MIB), worker("b", 2000)], CHOSEN)
    two = make_plan(
        SMALL,
        [replace(every[0], memory_bytes=300 * MIB), worker("b", 2000)],
        replace(CHOSEN, kept_context=2 * alone.context_length),
    )
    assert layers_of(two) != layers_of(alone) and not two.lacks_kv_memory


def test_a_kept_context_that_no_plan_holds_leaves_a_plan_with_less_kv_memory() -> None:
    kept = replace(CHOSEN, kept_context=65_536)
    plan = make_plan(SMALL, [worker("a", 400)], kept)
    assert plan.context_length == 65_536 and plan.lacks_kv_memory and 16 * plan.kv_blocks >= LEAST
    with pytest.raises(InsufficientMemoryError):
        make_plan(SMALL, [worker("a", 200)], kept)
    with pytest.raises(InsufficientMemoryError):
        make_plan(SMALL, [worker("a", 200)], FIXED)


def test_lengths_are_few_round_numbers_between_the_bounds() -> None:
    bounds = ContextBounds(4096, 20_000, 40_000)
    found = {bounds.longest(lambda length: length <= most) for most in range(1, 21_000, 100)}  # noqa: B023
    assert found == {4096, 5120, 6144, 7168, 8192, 10_240, 12_288, 14_336, 16_384, 20_000}
    assert ContextBounds(500, 500, 500).longest(lambda length: False) == 500


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        (ContextChoice(8192, ContextBounds(4096, 8192, 8192)), "8192 tokens (the model's own context length)"),
        (
            ContextChoice(6144, ContextBounds(4096, 40_960, 40_960), 300 * MIB),
            "6144 tokens (the model's own 40960 would need 300 MiB more, as it is to leave half of the memory "
            "beside the weights free; `context_length` changes it)",
        ),
        (
            ContextChoice(4096, ContextBounds(4096, 4096, 131_072, ContextBound.ROPE)),
            "4096 tokens (the model's own is 131072; a longer one takes the file's factors for long contexts, which "
            "changes answers; `context_length` changes it)",
        ),
        (
            ContextChoice(512, ContextBounds(512, 512, 2048, ContextBound.KEY)),
            "512 tokens (`context_length` sets it; the model's own is 2048)",
        ),
    ],
)
def test_the_choice_is_explained(choice: ContextChoice, words: str) -> None:
    assert choice.text == words


def test_plans_say_what_was_chosen_and_which_key_changes_it() -> None:
    plan = make_plan(SMALL, [worker("a", 2000)], CHOSEN)
    (line,) = (line for line in plan_lines(plan) if line.startswith("  context: "))
    assert f"{plan.context_length} tokens" in line and "`context_length` changes it" in line
    values = plan_json(plan)
    assert values["context_length"] == values["context"]["tokens"] == plan.context_length
    assert values["context"]["trained"] == TRAINED and values["context"]["text"] in line


@pytest.mark.parametrize(
    ("choice", "prompt", "advice"),
    [
        (
            ContextChoice(4096, ContextBounds(4096, 32_768, 32_768), MIB),
            17_900,
            "set `context_length` to 19456 or more",
        ),
        (
            ContextChoice(2048, ContextBounds(2048, 2048, 8192, ContextBound.KEY)),
            2048,
            "to 3072 or more (it is set to 2048; the model allows 8192)",
        ),
        (
            ContextChoice(4096, ContextBounds(4096, 4096, 131_072, ContextBound.ROPE)),
            9000,
            "(the default of 4096 is due to the model file; the model allows 131072)",
        ),
        (ContextChoice(4096, ContextBounds(4096, 8192, 8192), MIB), 8100, "to 8192 or more"),
        (
            ContextChoice(4096, ContextBounds(4096, 4096, 32_768, ContextBound.KV_DISK)),
            9000,
            "to 10240 or more (the default of 4096 is due to `kv_disk`, which keeps a sliding window only up to this",
        ),
        (
            ContextChoice(4096, ContextBounds(4096, 4096, 32_768, ContextBound.ENCODER, 8192)),
            5000,
            "to 6144 or more (the default of 4096 is due to the model, which computes a prompt in one batch; "
            "`context_length` allows 8192)",
        ),
        (
            ContextChoice(4096, ContextBounds(4096, 4096, 32_768, ContextBound.ENCODER, 8192)),
            9000,
            "`context_length` allows no more than 8192; shorten it",
        ),
        (ContextChoice(4096, ContextBounds(4096, 1 << 20, 10 << 20), MIB), 1_048_000, f"to {1 << 20} or more"),
        (
            ContextChoice(4096, ContextBounds(4096, 1 << 20, 10 << 20), MIB),
            2_000_000,
            f"`context_length` allows no more than {1 << 20}",
        ),
        (ContextChoice(1 << 20, ContextBounds(4096, 1 << 20, 10 << 20)), 2_000_000, "allows no more; shorten it"),
        (ContextChoice(4096, ContextBounds(4096, 8192, 8192), MIB), 9000, "the model allows no more than 8192"),
        (ContextChoice(1024, ContextBounds.fixed(1024)), 2000, "the model allows no more; shorten it"),
    ],
)
def test_errors_of_long_prompts_name_the_key_and_a_length_that_suffices(
    choice: ContextChoice, prompt: int, advice: str
) -> None:
    assert advice in choice.advice(prompt)


@pytest.mark.parametrize("tokens", [1000, 4096, 65_536])
@pytest.mark.parametrize("has_blocks", [1, 30, 62])
def test_models_that_take_too_much_memory_are_told_by_the_missing_mib(tokens: int, has_blocks: int) -> None:
    whole = make_plan(SMALL, [worker("a", 10_000)], replace(CHOSEN, kept_context=tokens))
    block_bytes = sum(stage.kv_bytes for stage in whole.stages) // whole.kv_blocks
    short = replace(
        whole,
        kv_blocks=has_blocks,
        stages=tuple(replace(stage, kv_bytes=has_blocks * block_bytes) for stage in whole.stages),
    )
    missing_bytes = (-(-tokens // 16) - has_blocks) * block_bytes
    error = other_models_error(short)
    assert error.missing_bytes == missing_bytes and error.exit_code == 3 and error.fitting_context == 16 * has_blocks
    assert f"; {mib(missing_bytes)} MiB are missing. Unload another model, " in str(error)
    assert str(error).endswith(f"or set context_length to {16 * has_blocks} or less")
    assert whole.missing_kv_bytes == 0

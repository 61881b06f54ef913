"""Tests of plans for models whose last layers read the keys and values of other layers."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest

from llamaclust.cluster.planner.costs import GpuFacts, StageCosts
from llamaclust.cluster.planner.planner import make_plan
from llamaclust.core.errors import InsufficientMemoryError, UsageError
from llamaclust.core.sizes import MIB
from llamaclust.model.costs import ModelCosts
from support.plans.plan_inputs import LAYER, REQUEST, profile, split_by_hand, worker

FIRST_SHARED = 6
COSTS = ModelCosts(
    *(20 * MIB, 20 * MIB, 10**6),
    (LAYER,) * FIRST_SHARED
    + tuple(replace(LAYER, kv_source=4 + number % 2, kv_bytes_per_token=0) for number in range(6)),
)
BORDERS = [0, 1, 2, 3, 4, 12]


def test_no_border_stands_between_layers_that_share_keys_and_values() -> None:
    possible = StageCosts.of(COSTS).possible
    assert [border for border in range(13) if possible[border, border]] == BORDERS
    assert possible[0, 4] and possible[4, 12] and not possible[0, 6] and not possible[5, 12]


@pytest.mark.parametrize("objective", ["latency", "throughput"])
@pytest.mark.parametrize("names", ["ab", "abc", "abcde"])
@pytest.mark.parametrize("measured", [True, False])
def test_plans_keep_such_layers_together(objective: str, names: str, measured: bool) -> None:
    workers = [worker(name, read=20 if measured else None) for name in names]
    plan = make_plan(COSTS, workers, replace(REQUEST, objective=objective))
    assert {stage.start for stage in plan.stages} <= set(BORDERS[:-1])


def test_a_manual_plan_between_them_is_refused() -> None:
    request = replace(REQUEST, manual=split_by_hand(("a", 0, 6), ("b", 6, 12)))
    message = r"worker 'a' cannot have layers \[0, 6\): .*allowed bounds are 0, 1, 2, 3, 4, 12"
    with pytest.raises(UsageError, match=message):
        make_plan(COSTS, [worker("a"), worker("b")], request)
    good = make_plan(
        COSTS, [worker("a"), worker("b")], replace(request, manual=split_by_hand(("a", 0, 4), ("b", 4, 12)))
    )
    assert [stage.end for stage in good.stages] == [4, 12]


def devices_of_plan(gpu_mib: int, gpu_layers: int | None = None) -> list[tuple[str, int, int]]:
    gpu = GpuFacts("cuda:0", gpu_mib * MIB, profile(400, 30_000))
    facts = replace(worker("a"), gpus=(gpu,), gpu_layers=gpu_layers)
    (stage,) = make_plan(COSTS, [facts], replace(REQUEST, max_sequences=1)).stages
    return [(part.device, part.start, part.end) for part in stage.devices]


@pytest.mark.parametrize(
    ("gpu_mib", "gpu_layers", "first"),
    [(1000, None, 0), (140, None, 3), (120, None, 4), (110, None, 12), (1000, 8, 4), (1000, 7, 12), (1000, 10, 2)],
)
def test_no_border_of_devices_stands_between_them(gpu_mib: int, gpu_layers: int | None, first: int) -> None:
    """The GPU has as many layers as fit, or as the user allows, from a possible border on."""
    cpu, gpu = [("cpu", 0, first)] * (first > 0), [("cuda:0", first, 12)] * (first < 12)
    assert devices_of_plan(gpu_mib, gpu_layers) == cpu + gpu


def test_stages_of_several_workers_have_such_borders_of_devices() -> None:
    """Checks several sizes of two GPUs."""
    for sizes in product((60, 90, 120, 150), repeat=2):
        gpus = tuple(GpuFacts(f"cuda:{n}", mib * MIB, profile(400, 30_000)) for n, mib in enumerate(sizes))
        plan = make_plan(COSTS, [replace(worker("a"), gpus=gpus), worker("b")], REQUEST)
        assert {part.start for stage in plan.stages for part in stage.devices} <= set(BORDERS), sizes


def test_workers_that_are_too_small_for_them_together_are_named() -> None:
    small = [worker(name, memory_mib=75) for name in "abc"]  # room for four layers each
    assert make_plan(
        ModelCosts(*(20 * MIB, 20 * MIB, 10**6), (LAYER,) * 12), [*small, worker("d", memory_mib=75)], REQUEST
    )
    with pytest.raises(InsufficientMemoryError, match="the model does not fit"):
        make_plan(COSTS, [*small, worker("d", memory_mib=75)], REQUEST)

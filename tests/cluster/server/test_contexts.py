"""Tests the choice of context lengths for several models that share memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import permutations
from types import SimpleNamespace
from typing import Any

import pytest

from llamaclust.cluster.config.cluster_config import ClusterConfig
from llamaclust.cluster.control.memory_ledger import MemoryLedger
from llamaclust.cluster.planner.context import ContextBounds
from llamaclust.cluster.planner.memory import PlanRequest
from llamaclust.cluster.planner.plan import Plan
from llamaclust.cluster.planner.planner import make_plan
from llamaclust.cluster.server.contexts import choose_contexts, keep_contexts
from llamaclust.core.sizes import MIB
from support.plans.plan_inputs import SMALL, worker, workspace

TRAINED = 131_072
REQUEST = PlanRequest(4096, 32, workspace, kv_tokens=8192, context_bounds=ContextBounds(4096, TRAINED, TRAINED))


@dataclass(eq=False)
class OneModel:
    """A planner of a model with 160 MiB of weights and 48 KiB of keys and values a token, on one machine."""

    name: str
    memory_mib: int
    layers: int = 12
    most_loaded: int | None = None
    kept_context: int | None = None
    plans: int = 0
    model: Any = field(init=False)
    config: Any = field(init=False)

    def __post_init__(self) -> None:
        self.model = SimpleNamespace(
            model_id=self.name,
            hyperparameters=SimpleNamespace(context_length=TRAINED),
            short_rope_context=None,
            is_causal=True,
            window=None,
            projector=None,
        )
        keys = {"models": [{"model": "x"}], "workers": [{"name": "a"}]}
        self.config = ClusterConfig.model_validate(
            keys if self.most_loaded is None else keys | {"max_loaded_models": self.most_loaded}
        )

    async def plan(
        self, workers: Mapping[str, Any], beside: MemoryLedger, *, needs_images: bool, context: int | None = None
    ) -> Plan:
        self.plans += 1
        held = beside.beside(self.name)["a", "cpu"]
        machine = replace(worker("a"), memory_bytes=self.memory_mib * MIB - held)
        costs = replace(SMALL, layers=SMALL.layers[:1] * self.layers)
        return make_plan(costs, [machine], replace(REQUEST, kept_context=context or self.kept_context))


async def chosen(*planners: OneModel) -> list[int | None]:
    await choose_contexts(planners, {})  # type: ignore[arg-type]
    return [planner.kept_context for planner in planners]


async def together(*planners: OneModel) -> MemoryLedger:
    """Loads the models one after another, as requests do, and fails if one no longer fits."""
    ledger = MemoryLedger()
    for planner in planners:
        plan = await planner.plan({}, ledger, needs_images=False)
        assert not plan.lacks_kv_memory
        ledger.enter(planner.name, (plan,))
    return ledger


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("memory_mib", [3500, 6000, 20_000])
async def test_models_that_fit_together_still_do_in_any_order(count: int, memory_mib: int) -> None:
    planners = [OneModel(f"m{number}", memory_mib) for number in range(count)]
    contexts = await chosen(*planners)
    assert all(context is not None and context >= 4096 for context in contexts), contexts
    await together(*planners)
    await together(*reversed(planners))


async def test_of_models_that_do_not_all_fit_none_needs_the_memory_of_several_others() -> None:
    planners = [OneModel(f"m{number}", 1400) for number in range(4)]
    contexts = await chosen(*planners)
    assert contexts[-1] == 4096
    for planner in planners[1:]:
        await together(planners[0], planner)


async def test_a_model_that_fits_only_alone_takes_the_memory_of_all() -> None:
    small, large = OneModel("small", 2000), OneModel("large", 2000, layers=80)
    alone, of_large = OneModel("alone", 2000), OneModel("large alone", 2000, layers=80)
    assert await chosen(small, large) == [(await chosen(alone))[0], (await chosen(of_large))[0]]


async def test_models_that_are_never_loaded_together_have_the_whole_memory_each() -> None:
    two = [OneModel(name, 4000, most_loaded=1) for name in "ab"]
    (alone,) = await chosen(OneModel("alone", 4000))
    assert await chosen(*two) == [alone, alone]


async def test_a_context_of_an_earlier_coordinator_is_kept_and_the_others_make_room() -> None:
    planners = [OneModel(name, 4000) for name in "ab"]
    keep_contexts(planners, {"b": 20_480, "unknown": 5})  # type: ignore[arg-type]
    first, second = await chosen(*planners)
    assert second == 20_480 and first is not None and first >= 4096
    await together(*planners)


@pytest.mark.parametrize("memory_mib", [1000, 1400, 2400])
@pytest.mark.parametrize("count", [3, 8, 16])
async def test_the_number_of_plans_grows_with_the_number_of_models_alone(count: int, memory_mib: int) -> None:
    planners = [OneModel(f"m{number}", memory_mib, layers=12 + 10 * (number % 3)) for number in range(count)]
    await chosen(*planners)
    assert max(planner.plans for planner in planners) <= 4


@pytest.mark.parametrize(("count", "limit"), [(3, 2), (4, 2), (5, 3)])
@pytest.mark.parametrize("memory_mib", [3500, 4000, 9000])
async def test_a_limit_of_loaded_models_leaves_the_memory_of_the_others(
    count: int, limit: int, memory_mib: int
) -> None:
    """Any models that may be loaded at the same time fit together."""
    planners = [OneModel(f"m{number}", memory_mib, most_loaded=limit) for number in range(count)]
    contexts = await chosen(*planners)
    for some in permutations(planners, limit):
        await together(*some)
    unlimited = await chosen(*(OneModel(f"m{number}", memory_mib) for number in range(count)))
    as_many = await chosen(*(OneModel(f"m{number}", memory_mib) for number in range(limit)))
    assert None not in contexts and sum(filter(None, contexts)) > sum(filter(None, unlimited))
    assert contexts[:limit] == as_many

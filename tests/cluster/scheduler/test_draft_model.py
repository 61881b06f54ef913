"""Tests of waits for a draft model: no token changes, no wait is endless, and drafts are requested if they pay."""

from __future__ import annotations

import random
from collections.abc import Hashable, Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamaclust.cluster.scheduler.drafting.drafter import NO_DRAFT, Draft
from llamaclust.cluster.scheduler.requests import GenerationRequest
from llamaclust.cluster.scheduler.scheduler import Scheduler
from llamaclust.cluster.scheduler.settings import SchedulerSettings
from llamaclust.cluster.scheduler.speculation import speculation as module
from llamaclust.cluster.scheduler.speculation.settings import SpeculationSettings
from support.clusters.fakes import (
    VOCABULARY,
    ConstantModel,
    FakeModel,
    FakeStages,
    Simulation,
    StageNs,
    expected,
    linear,
)
from support.plans.draft_models import DraftingSimulation, SaidModel, wait_for_any
from support.plans.drafting import AnyWindows, SaidDrafters, nonsense, replayed
from support.plans.simulations import BASE, check_answer, check_writes, random_request

PROMPT = 64
_SEED = 5


class NoDrafters:
    def of(self, key: Hashable) -> NoDrafters:
        return self

    def ended(self, key: Hashable, tokens: Sequence[int]) -> None:
        pass

    def draft(self, tokens: Sequence[int], most: int) -> Draft:
        return NO_DRAFT


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_a_draft_model_changes_no_token_and_leaks_nothing(seed: int) -> None:
    source = random.Random(seed)
    requests = [random_request(source) for _ in range(source.randint(1, 8))]
    texts = [[*each.prompt, *(row.token for row in expected(each, BASE.context_length)[0])] for each in requests]
    right = source.choice([0.0, 0.5, 0.9, 1.0])
    says = replayed(texts, right, source, VOCABULARY) if source.random() < 0.8 else nonsense(source, VOCABULARY)
    model = SaidModel(says, source.choice([1, 10_000, 10_000_000]), source.choice([1, 1000]), source.randint(1, 8))
    own = SpeculationSettings(SaidDrafters(says) if source.random() < 0.3 else NoDrafters(), draft_model=model)
    chosen = replace(
        BASE,
        speculation=own,
        prefill_chunk=source.choice([None, 1, 16]),
        kv_blocks=source.randint(13, 40),
        max_sequences=source.randint(1, 8),
    )
    stages = source.randint(1, 3)
    fake = FakeStages(FakeModel(chosen.kv_blocks), [linear(100, 10)] * stages, source.choice([0, 1000, 1_000_000]))
    run = DraftingSimulation(Scheduler(chosen, 1, stages), fake)
    check_writes(run)
    keys: dict[int, GenerationRequest] = {}
    with pytest.MonkeyPatch.context() as patch:
        wait_for_any(source, 32, patch)
        patch.setattr(module, "best_windows", AnyWindows(source, 32))
        for request in requests:
            keys[run.add(request)] = request
            for _ in range(source.choice([0, 0, 1, 5, 20])):
                run.step()
            if source.random() < 0.15 and run.scheduler.abort(victim := source.choice(list(keys))) is not None:
                del keys[victim]
            if source.random() < 0.05:
                model.lose()
        run.finish()
    for key, request in keys.items():
        check_answer(run, key, request)
    counts = run.scheduler.counts
    assert (counts.kv_blocks_held, counts.running, counts.waiting, counts.in_flight) == (0, 0, 0, 0)


def test_sequences_go_on_without_a_model_that_is_lost() -> None:
    request = GenerationRequest("r", tuple(range(1, 30)), 60)
    model = SaidModel(lambda tokens, most: (1,) * most, 1000, 10)
    run = _run(model, [linear(4000, 50)], 100)
    assert isinstance(run, DraftingSimulation)
    run.add(request)
    for _ in range(1000):
        run.send_all()
        if run.replies is not None and any(reply.tokens for reply in run.replies[1].replies):
            break
        run.step()
    assert run.replies is not None
    run.replies = None
    model.lose()
    asked = len(model.asked)
    run.sent.clear()
    run.stages = FakeStages(ConstantModel(run.scheduler.settings.kv_blocks), [linear(4000, 50)], 100_000)
    run.scheduler.restart(run.scheduler.settings, 2, 1)
    run.add(replace(request, request_id="after the loss"))
    run.finish()
    assert len(model.asked) == asked, "nor is it asked by the next pipeline"


CURVES = {
    "bound by memory": ([linear(4000, 50)], 100.0),
    "rows cost a fifth": ([linear(3200, 800)], 100.0),
    "two stages far apart": ([linear(2000, 200)] * 2, 10_000.0),
}


@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize("step_us", [200, 800])
@pytest.mark.parametrize(("right", "share"), [(0.0, 0.97), (0.6, 0.85), (0.9, 0.85), (1.0, 0.8)])
def test_gains_are_near_what_cost_and_acceptance_allow(curve: str, step_us: int, right: float, share: float) -> None:
    stage_ns, hop_us = CURVES[curve]
    plain_ms = _ms(_run(None, stage_ns, hop_us), 1500)
    gain = plain_ms / _ms(_run(_model(right, step_us), stage_ns, hop_us), 1500)
    hops_ns = (len(stage_ns) + 1) * hop_us * 1000
    allowed = 1.0
    for count in range(1, 33):
        tokens = sum(right**depth for depth in range(count + 1))
        round_ns = sum(ns(count + 1) for ns in stage_ns) + hops_ns + count * step_us * 1000
        allowed = max(allowed, tokens * plain_ms * 1e6 / 1500 / round_ns)
    assert gain >= share * allowed, f"{gain:.2f} of {allowed:.2f}"


def test_a_model_whose_first_drafts_are_late_is_tried_again() -> None:
    """Machines pause, so that the time of some drafts says little about the next."""
    stage_ns, late_ms = [linear(4000, 50)], 100
    plain_ms = _ms(_run(None, stage_ns, 100), 1500)
    on_time_ms = _ms(_run(_model(0.6, 800), stage_ns, 100), 1500)
    model = _model(0.6, 800)
    model.late_ns = [late_ms * 1_000_000] * 3
    gain = plain_ms / (_ms(_run(model, stage_ns, 100), 1500) - 3 * late_ms)
    assert gain >= 0.95 * plain_ms / on_time_ms > 1.1, f"{gain:.2f} of {plain_ms / on_time_ms:.2f}"
    assert not model.late_ns


@pytest.mark.parametrize("seed", range(6))
def test_a_stage_that_is_slow_at_times_makes_no_draft_worth_it(seed: int) -> None:
    """A time of few rows, learned while the stage was slow, does not count for long if more rows take less by now."""
    gain = _ms(_run(None, [_varying(seed)], 100), 600) / _ms(_run(_model(0.3, 4900), [_varying(seed)], 100), 600)
    assert gain >= 0.96, f"{gain:.3f}"


def _varying(seed: int) -> StageNs:
    """Returns steps of about 22 ms, of which about 40 in a row are slow or fast, and single ones are late."""
    source, usual = random.Random(seed), linear(21_700, 1000)
    pace = 1.0

    def taken_ns(rows: int) -> int:
        nonlocal pace
        if source.random() < 1 / 40:
            pace = source.choice([0.85, 1.0, 1.0, 1.5])
        late = 0.6 if source.random() < 0.08 else 0.0
        return round(usual(rows) * pace * (max(0.75, source.gauss(1, 0.12)) + late))

    return taken_ns


def _model(right: float, step_us: int) -> SaidModel:
    source = random.Random(_SEED)
    says = lambda tokens, most: tuple(1 if source.random() < right else 2 for _ in range(most))  # noqa: E731
    return SaidModel(says, step_us * 1000, 40_000)


def test_several_sequences_wait_together() -> None:
    model = SaidModel(lambda tokens, most: (1,) * most, 100_000, 10_000)
    plain = _ms(_run(None, [linear(4000, 50)], 100), 400, sequences=4)
    assert plain / _ms(_run(model, [linear(4000, 50)], 100), 400, sequences=4) > 3
    together = [order.length for order in model.asked if order.most]
    assert len(together) > 20


def _run(model: SaidModel | None, stage_ns: Sequence[StageNs], hop_us: float) -> DraftingSimulation | Simulation:
    speculation = None if model is None else SpeculationSettings(NoDrafters(), draft_model=model)
    settings = SchedulerSettings("m", VOCABULARY, 4096, 4096, prefix_cache=False, speculation=speculation)
    fake = FakeStages(ConstantModel(settings.kv_blocks), stage_ns, round(hop_us * 1000))
    kind = Simulation if model is None else DraftingSimulation
    return kind(Scheduler(settings, 1, len(stage_ns)), fake)


def _ms(run: Simulation, tokens: int, sequences: int = 1) -> float:
    """Returns the milliseconds that `tokens` tokens of each sequence take after the prompts."""
    keys = [run.add(GenerationRequest("r", (index,) * PROMPT, tokens)) for index in range(sequences)]
    while not all(run.rows(key) for key in keys):
        run.step()
    begun_ns = run.now_ns
    run.finish()
    return (run.now_ns - begun_ns) / 1e6

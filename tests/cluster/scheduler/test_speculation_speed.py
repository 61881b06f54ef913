"""Compares gains of drafted rows with what the cost of rows allows and with plain steps, on a simulated clock."""

from __future__ import annotations

import random
from collections.abc import Hashable, Sequence
from dataclasses import replace
from statistics import mean

import pytest

from llamaclust.cluster.scheduler.drafting.drafter import LONG, Draft
from llamaclust.cluster.scheduler.requests import GenerationRequest
from llamaclust.cluster.scheduler.scheduler import Scheduler
from llamaclust.cluster.scheduler.settings import SchedulerSettings
from llamaclust.cluster.scheduler.speculation.settings import SpeculationSettings
from support.clusters.fakes import VOCABULARY, ConstantModel, FakeStages, Simulation, StageNs, linear

PROMPT = 64
_SEED = 5
"""Fixed seed, because gains vary by chance."""
SETTINGS = SchedulerSettings("m", VOCABULARY, context_length=4096, kv_blocks=4096, prefix_cache=False)


class Drafting:
    """Drafters whose tokens are right with a probability that depends on the length of the answer."""

    def __init__(self, *stretches: tuple[int, float], seed: int = _SEED) -> None:
        """Takes pairs (tokens of the answer, probability) in order; the last probability continues."""
        self._stretches = stretches
        self._source = random.Random(seed)

    def of(self, key: Hashable) -> Drafting:
        return self

    def ended(self, key: Hashable, tokens: Sequence[int]) -> None:
        pass

    def draft(self, tokens: Sequence[int], most: int) -> Draft:
        behind = len(tokens) - PROMPT
        right = (self._source.random() < self._right(behind + place) for place in range(most))
        return Draft(tuple(1 if is_right else 2 for is_right in right), LONG)

    def _right(self, place: int) -> float:
        for tokens, right in self._stretches[:-1]:
            if place < tokens:
                return right
            place -= tokens
        return self._stretches[-1][1]


def ms_of(
    drafting: Drafting | None, stage_ns: Sequence[StageNs], hop_us: float, tokens: int, sequences: int = 1
) -> float:
    """Returns the milliseconds of `tokens` tokens of each sequence after the prompts."""
    speculation = None if drafting is None else SpeculationSettings(drafting)
    settings = replace(SETTINGS, speculation=speculation)
    fake = FakeStages(ConstantModel(settings.kv_blocks), stage_ns, round(hop_us * 1000))
    run = Simulation(Scheduler(settings, 1, len(stage_ns)), fake)
    keys = [run.add(GenerationRequest("r", (index,) * PROMPT, tokens)) for index in range(sequences)]
    while not all(run.rows(key) for key in keys):
        run.step()
    begun = run.now_ns
    run.finish()
    return (run.now_ns - begun) / 1e6


def allowed_gain(right: float, token_ms: float, stage_ns: Sequence[StageNs], hop_us: float) -> float:
    """Returns the gain of the best window over plain steps, if the window and the time of rows are known."""
    hops_ns = (len(stage_ns) + 1) * hop_us * 1000
    rates = [1e-6 / token_ms]  # tokens per nanosecond
    for window in range(1, 33):
        tokens = sum(right**depth for depth in range(window + 1))
        rates.append(tokens / (sum(ns(window + 1) for ns in stage_ns) + hops_ns))
    return max(rates) / rates[0]


CURVES = {
    "bound by memory": ([linear(4000, 50)], 100.0),
    "rows cost a fifth": ([linear(3200, 800)], 100.0),
    "rows cost a half": ([linear(2000, 2000)], 100.0),
    "two stages": ([linear(2000, 200)] * 2, 250.0),
    "two stages far apart": ([linear(2000, 200)] * 2, 10_000.0),
    "four stages far apart": ([linear(1000, 100)] * 4, 25_000.0),
}


@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize(("right", "share"), [(0.0, 0.97), (0.5, 0.80), (0.8, 0.82), (0.95, 0.85), (1.0, 0.8)])
def test_gains_are_near_what_the_cost_of_rows_allows(curve: str, right: float, share: float) -> None:
    stage_ns, hop_us = CURVES[curve]
    plain_ms = ms_of(None, stage_ns, hop_us, 300)
    allowed = allowed_gain(right, plain_ms / 300, stage_ns, hop_us)
    tokens = 300 if right == 0.0 else 2000  # no drafts for the first tokens yet
    drafted_ms = mean(ms_of(Drafting((0, right), seed=seed), stage_ns, hop_us, tokens) for seed in range(4))
    gain = plain_ms * tokens / 300 / drafted_ms
    assert gain >= share * allowed, f"{gain:.2f} of {allowed:.2f}"


@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize("stretches", [((300, 0.0), (0, 0.95)), ((300, 0.95), (0, 0.0))], ids=["better", "worse"])
def test_a_change_costs_three_tokens_at_most(curve: str, stretches: tuple[tuple[int, float], ...]) -> None:
    """The cost is the time beyond that of both stretches alone."""
    stage_ns, hop_us = CURVES[curve]
    both = ms_of(Drafting(*stretches), stage_ns, hop_us, 600)
    apart = sum(ms_of(Drafting((0, right)), stage_ns, hop_us, 300) for _, right in stretches)
    token_ms = ms_of(None, stage_ns, hop_us, 300) / 300
    assert both - apart <= 3 * token_ms + 0.05 * apart, f"{(both - apart) / token_ms:.1f} tokens"


@pytest.mark.parametrize("right", [0.0, 0.3, 0.8])
@pytest.mark.parametrize("curve", CURVES)
def test_eight_together_are_never_slower(curve: str, right: float) -> None:
    stage_ns, hop_us = CURVES[curve]
    plain = ms_of(None, stage_ns, hop_us, 150, sequences=8)
    assert plain / ms_of(Drafting((0, right)), stage_ns, hop_us, 150, sequences=8) >= 0.98

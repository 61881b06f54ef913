"""Tests of acceptance rates that are learned from tokens."""

from __future__ import annotations

import random
from collections.abc import Iterable
from statistics import mean

import pytest

from llamaclust.cluster.scheduler.speculation.acceptance import Acceptance
from support.seed import SEED


def learned(outcomes: Iterable[bool]) -> Acceptance:
    acceptance = Acceptance()
    for outcome in outcomes:
        acceptance.learn(is_accepted=outcome)
    return acceptance


@pytest.mark.parametrize("prior", [0.0, 0.3, 0.95])
def test_without_experience_it_is_what_it_was_taken_for(prior: float) -> None:
    assert Acceptance().rate(prior) == pytest.approx(prior)


@pytest.mark.parametrize("right", [0.0, 0.2, 0.5, 0.8, 0.95, 1.0])
def test_a_steady_rate_is_learned(right: float) -> None:
    draw = random.Random(SEED)
    rates = [learned(draw.random() < right for _ in range(200)).rate(0.5) for _ in range(60)]
    assert abs(mean(rates) - right) < 0.06
    assert all(0 < rate < 1 for rate in rates)


@pytest.mark.parametrize(("before", "tokens"), [(False, 3), (True, 3)])
def test_a_change_is_seen_after_a_few_tokens(before: bool, tokens: int) -> None:
    acceptance = learned([before] * 200)
    for _ in range(tokens):
        acceptance.learn(is_accepted=not before)
    assert (acceptance.rate(0.5) > 0.6) is not before


def test_one_other_token_behind_a_change_does_not_bring_back_what_was_before() -> None:
    assert learned([*[False] * 200, *[True] * 12, False]).rate(0.5) > 0.6
    assert learned([*[True] * 200, *[False] * 12, True]).rate(0.5) < 0.4


def test_one_other_token_changes_little() -> None:
    draw = random.Random(SEED)
    usual = [draw.random() < 0.95 for _ in range(150)]
    assert learned([*usual, *[True] * 30, False]).rate(0.5) > 0.7


def test_no_more_is_kept_of_more_tokens() -> None:
    draw = random.Random(SEED)
    acceptance = learned([*(draw.random() < 0.5 for _ in range(5000)), *[True, False] * 20])
    assert len(acceptance._segments) <= 6
    assert 0.3 < acceptance.rate(0.9) < 0.7

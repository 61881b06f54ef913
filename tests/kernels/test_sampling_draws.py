"""Tests of random bits, of the distribution of draws, and of rows without a result."""

from __future__ import annotations

import math

import numpy as np
import pytest

from llamaclust.core.sampler.params import SamplingParams
from llamaclust.core.sampler.tasks import SampleTask, ScoreTask
from llamaclust.kernels import _native
from llamaclust.kernels.reference import candidates as reference
from llamaclust.kernels.sampling import Sampler
from support.arithmetic.sampled import sampled, second_draw

ONES = 0xFFFFFFFF
# From Random123's kat_vectors, philox4x32 with 10 rounds: counter, key, output.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES, ONES, ONES, ONES), (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_philox_gives_the_published_answers(
    counter: tuple[int, int, int, int], key: tuple[int, int], answer: tuple[int, int, int, int]
) -> None:
    assert tuple(_native.philox(counter, key)) == answer
    assert reference.philox(counter, key) == answer


def chi_square(counts: list[int], expected: list[float]) -> float:
    return sum((count - e) ** 2 / e for count, e in zip(counts, expected, strict=True))


@pytest.mark.parametrize(("vary", "temperature"), [("position", 1.0), ("seed", 0.7), ("choice", 1.6)])
def test_draws_follow_the_distribution(vary: str, temperature: float) -> None:
    """Chi-square, with 9 degrees of freedom, is below 27.9 in 999 of 1000 cases; all runs have equal draws."""
    logits = np.linspace(-1.5, 1.5, 10).astype(np.float32)
    probability = np.exp(logits / temperature) / np.exp(logits / temperature).sum()
    params, draws = SamplingParams(temperature=temperature), 20_000
    tasks = tuple(
        SampleTask(params, **{"seed": 42, "choice": 0, "position": 5, vary: number})  # type: ignore[arg-type]
        for number in range(draws)
    )
    results = Sampler(10).run(np.tile(logits, (draws, 1)), tasks)
    counts = np.bincount([result.token for result in results], minlength=10)
    assert chi_square(counts.tolist(), (probability * draws).tolist()) < 27.9


def test_second_draws_of_refused_tokens_give_the_distribution_of_the_allowed_ones() -> None:
    """A token that is not allowed is drawn again independently, so the result has the distribution of the allowed
    tokens. Chi-square, with 5 degrees of freedom, is below 20.5 in 999 of 1000 cases."""
    logits = np.linspace(-1.5, 1.5, 10).astype(np.float32)
    ids, draws = [0, 2, 4, 6, 8, 9], 20_000
    allowed = np.array([sum(1 << token for token in ids)], np.uint32)
    tasks = tuple(SampleTask(SamplingParams(temperature=1.0), 42, 0, position) for position in range(draws))
    sampler, tokens = Sampler(10), np.zeros(draws, np.int64)
    tokens[:] = [result.token for result in sampler.run(np.tile(logits, (draws, 1)), tasks)]
    refused = np.flatnonzero(~np.isin(tokens, ids))
    again = tuple(second_draw(tasks[place]) for place in refused)
    rows = sampler.run(np.tile(logits, (len(again), 1)), again, [allowed] * len(again))
    tokens[refused] = [row.token for row in rows]
    probability = np.exp(logits[ids]) / np.exp(logits[ids]).sum()
    counts = np.bincount(tokens, minlength=10)
    assert len(again) > draws // 5 and counts.sum() == counts[ids].sum()
    assert chi_square(counts[ids].tolist(), (probability * draws).tolist()) < 20.5


def test_a_draw_depends_on_seed_choice_and_position_only() -> None:
    logits = np.random.default_rng(1).normal(0, 1, (1, 500)).astype(np.float32)
    sampler = Sampler(500)
    keys = [(seed, choice, position) for seed in (0, 1 << 63) for choice in (0, 1) for position in range(8)]
    tasks = {key: SampleTask(SamplingParams(temperature=1.0), *key) for key in keys}
    first = {key: sampler.run(logits, (task,)) for key, task in tasks.items()}
    again = {key: sampler.run(logits, (tasks[key],)) for key in reversed(keys)}
    assert first == again and len({result[0].token for result in first.values()}) > 20


@pytest.mark.parametrize("level", _native.available_levels())
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("place", [0, 63, 511])
def test_a_row_that_is_no_number_fails_alone(level: str, value: float, place: int) -> None:
    rows = np.random.default_rng(2).normal(0, 1, (3, 512)).astype(np.float32)
    rows[1, place] = value
    task = SampleTask(SamplingParams(temperature=0.5), 1, 0, 0, top_logprobs=2)
    results = Sampler(512, level).run(rows, (task, task, task))
    assert [result.failure is None for result in results] == [True, False, True]
    assert results[1].token == -1 and math.isnan(results[1].logprob) and "not finite" in str(results[1].failure)


def test_a_row_without_any_finite_value_fails() -> None:
    for value in (-np.inf, np.nan, np.inf):
        assert sampled(Sampler(100), np.full(100, value, np.float32), ScoreTask(3)).failure


def test_minus_infinity_is_never_chosen() -> None:
    logits = np.full(200, -np.inf, np.float32)
    logits[[4, 150]] = 1.0
    sampler = Sampler(200)
    for temperature in (0.5, 3e38, math.inf):
        for position in range(30):
            task = SampleTask(SamplingParams(temperature=temperature), 1, 0, position, top_logprobs=9)
            result = sampled(sampler, logits, task)
            assert result.token in (4, 150) and len(result.top_logprobs) == 2


def test_suppressing_everything_is_a_failure() -> None:
    task = SampleTask(SamplingParams(), 1, 0, 0, suppressed=(0, 1, 2))
    assert sampled(Sampler(3), np.zeros(3, np.float32), task).failure == "every token is suppressed"


@pytest.mark.parametrize("temperature", [1e-45, 1e-30, 0.001])
def test_a_tiny_temperature_takes_the_greatest(temperature: float) -> None:
    logits = np.random.default_rng(4).normal(0, 3, 3_000).astype(np.float32)
    task = SampleTask(SamplingParams(temperature=temperature), 1, 0, 0)
    assert sampled(Sampler(3_000), logits, task).token == int(np.argmax(logits))


def test_extreme_parameters_still_choose_a_token() -> None:
    logits = np.random.default_rng(6).normal(0, 3, 300).astype(np.float32)
    bias = ((0, 3e38), (1, -3e38), (2, math.inf), (3, -math.inf))
    for temperature in (0.0, 1.0):
        params = SamplingParams(temperature, 0, 0.9, 0.0, 1e-30, 3e38, -3e38, bias)
        assert sampled(Sampler(300), logits, SampleTask(params, 1, 0, 0, history=(0, 1, 2, 5, 5))).failure is None


@pytest.mark.parametrize("token", [-1, 10, 2**31 - 1])
def test_tokens_outside_the_vocabulary_are_named(token: int) -> None:
    logits, params = np.zeros(10, np.float32), SamplingParams(temperature=1.0)
    for task in (
        SampleTask(params, 1, 0, 0, history=(token,)),
        SampleTask(params, 1, 0, 0, suppressed=(token,)),
        SampleTask(SamplingParams(logit_bias=((token, 1.0),)), 1, 0, 0),
    ):
        assert f"token {token} is outside the vocabulary of 10" == sampled(Sampler(10), logits, task).failure
    assert sampled(Sampler(10), logits, ScoreTask(token)).failure


def test_unknown_levels_and_wrong_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="available: generic"):
        Sampler(10, "sse9")
    with pytest.raises(ValueError, match="tasks, vocabulary"):
        Sampler(10).run(np.zeros((2, 10), np.float32), (ScoreTask(1),))

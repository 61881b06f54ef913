"""Tests of the sampler against its NumPy reference over mixed parameters, with equal bits at every level."""

from __future__ import annotations

import ctypes
import ctypes.util
import math
import platform

import numpy as np
import pytest

from llamaclust.core.sampler.params import SamplingParams
from llamaclust.core.sampler.tasks import SampleTask, ScoreTask
from llamaclust.kernels import _native
from llamaclust.kernels.reference import sampling as reference
from llamaclust.kernels.sampling import Sampler
from support.arithmetic.sampled import sampled
from support.arithmetic.sampling_cases import random_logits, random_task, same

LEVELS = _native.available_levels()


@pytest.mark.parametrize("vocabulary", [1, 15, 64, 65, 320, 5_000])
@pytest.mark.parametrize("level", LEVELS)
def test_sampler_matches_the_reference(level: str, vocabulary: int) -> None:
    rng = np.random.default_rng(vocabulary)
    sampler = Sampler(vocabulary, level)
    for _ in range(120 if vocabulary < 1_000 else 25):
        logits, task = random_logits(rng, vocabulary), random_task(rng, vocabulary)
        if task.suppressed and vocabulary == 1:
            continue
        got, expected = sampled(sampler, logits, task), reference.run(logits, task)
        assert same(got, expected), f"{task}: {got} for {expected}"


def test_all_levels_thread_counts_and_batches_give_the_same_bits() -> None:
    rng = np.random.default_rng(3)
    rows = np.stack([random_logits(rng, 20_001) for _ in range(12)])
    tasks = tuple(random_task(rng, 20_001) for _ in range(12))
    batched = {(level, n): Sampler(20_001, level, n).run(rows, tasks) for level in LEVELS for n in (1, 2, 3)}
    assert len(set(batched.values())) == 1
    alone = Sampler(20_001, LEVELS[-1])
    assert tuple(sampled(alone, row, task) for row, task in zip(rows, tasks, strict=True)) == batched["generic", 1]


@pytest.mark.parametrize("level", LEVELS)
def test_scores_match_the_reference(level: str) -> None:
    rng = np.random.default_rng(5)
    logits = random_logits(rng, 700)
    for token in (0, 350, 699):
        task = ScoreTask(token, top_logprobs=700)
        assert same(sampled(Sampler(700, level), logits, task), reference.run(logits, task))


def test_logprob_is_of_the_raw_logits() -> None:
    logits = np.array([1.0, 3.0, 2.0], np.float32)
    params = SamplingParams(temperature=0.0, logit_bias=((0, 50.0),))
    result = sampled(Sampler(3), logits, SampleTask(params, 1, 0, 0))
    assert result.token == 0
    assert math.isclose(result.logprob, 1 - math.log(sum(math.exp(v) for v in (1, 2, 3))), rel_tol=1e-6)


def test_a_wide_flat_row_is_ranked_to_its_end() -> None:
    """Nearly every token is likely, so a draw continues past the tokens that the block maxima can rank."""
    rng = np.random.default_rng(9)
    logits = rng.normal(0, 0.01, 30_000).astype(np.float32)
    params = SamplingParams(temperature=1.5)
    for seed in range(12):
        task = SampleTask(params, seed << 60 | seed, 0, seed, top_logprobs=3)
        assert same(sampled(Sampler(30_000), logits, task), reference.run(logits, task))


def test_a_row_whose_sample_misleads_is_ranked_to_its_end() -> None:
    """The threshold is estimated from every 37th value, and only these values are high."""
    logits = np.random.default_rng(10).normal(0, 0.01, 30_000).astype(np.float32)
    logits[::37] += 0.5
    for position in range(12):
        task = SampleTask(SamplingParams(temperature=1.0), 6, 0, position)
        assert same(sampled(Sampler(30_000), logits, task), reference.run(logits, task))


def test_top_p_that_is_reached_exactly_ends_the_nucleus() -> None:
    params = SamplingParams(temperature=1.0, top_p=0.5)
    rows = np.zeros((60, 4), np.float32)
    results = Sampler(4).run(rows, tuple(SampleTask(params, 1, 0, position) for position in range(60)))
    assert {result.token for result in results} == {0, 1}


@pytest.mark.parametrize("level", LEVELS)
def test_ties_go_to_the_lower_id(level: str) -> None:
    logits = np.zeros(1_000, np.float32)
    logits[[77, 400, 999]] = [-0.0, 0.5, 0.5]
    task = SampleTask(SamplingParams(), 0, 0, 0, top_logprobs=4)
    result = sampled(Sampler(1_000, level), logits, task)
    assert result.token == 400 and [token for token, _ in result.top_logprobs] == [400, 999, 0, 1]


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the number of a rounding mode is known for x86-64 only")
def test_the_callers_rounding_mode_changes_nothing() -> None:
    rng = np.random.default_rng(8)
    sampler, logits = Sampler(900), random_logits(rng, 900)
    task = SampleTask(SamplingParams(temperature=0.5), 3, 0, 1, top_logprobs=100)
    expected = sampled(sampler, logits, task)
    libm = ctypes.CDLL(ctypes.util.find_library("m"))
    upward, nearest = 0x800, 0
    try:
        assert libm.fesetround(upward) == 0
        got = sampled(sampler, logits, task)
        assert libm.fegetround() == upward
    finally:
        libm.fesetround(nearest)
    assert got == expected

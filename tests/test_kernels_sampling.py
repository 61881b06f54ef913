"""The sampler against its NumPy reference, over parameter mixes; equal bits at every level."""

from __future__ import annotations

import ctypes
import ctypes.util
import math
import platform
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from sampled import sampled

from llamaclust.kernels.cpu import _native
from llamaclust.kernels.reference import sampling as reference
from llamaclust.kernels.sampling import Sampler
from llamaclust.wire.messages import RowResult, SampleTask, SamplingParams, ScoreTask

LEVELS = _native.available_levels()
Logits = NDArray[np.float32]


def random_logits(rng: np.random.Generator, vocabulary: int) -> Logits:
    """Rows of several widths, a third of them on a coarse grid so that values tie."""
    x = rng.normal(0, rng.choice([0.3, 2.0, 8.0]), vocabulary).astype(np.float32)
    return np.round(x * 4).astype(np.float32) / 4 if rng.random() < 0.33 else x


def random_task(rng: np.random.Generator, vocabulary: int) -> SampleTask:
    def sometimes(value: Any, default: Any) -> Any:
        return value if rng.random() < 0.5 else default

    ids = sorted({int(i) for i in rng.integers(0, vocabulary, 5)})
    params = SamplingParams(
        temperature=float(rng.choice([0.0, 0.3, 0.8, 1.0, 1.7])),
        top_k=sometimes(int(rng.choice([1, 2, 40, 1_000])), 0),
        top_p=sometimes(float(rng.choice([0.0, 0.1, 0.9, 0.999])), 1.0),
        min_p=sometimes(float(rng.choice([0.02, 0.3, 1.0])), 0.0),
        repetition_penalty=sometimes(float(rng.choice([0.8, 1.3])), 1.0),
        frequency_penalty=sometimes(float(rng.uniform(-1, 1)), 0.0),
        presence_penalty=sometimes(float(rng.uniform(-1, 1)), 0.0),
        logit_bias=sometimes(tuple((i, float(rng.uniform(-5, 5))) for i in ids), ()),
    )
    history = tuple(int(i) for i in rng.integers(0, min(vocabulary, 50), 30)) if params.needs_history else ()
    seed, position = int(rng.integers(0, 1 << 63)) * 2 + 1, int(rng.integers(0, 1 << 20))
    suppressed = sometimes((int(rng.integers(vocabulary)),), ())
    return SampleTask(params, seed, int(rng.integers(4)), position, history, suppressed, int(rng.choice([0, 5])))


def same(got: RowResult, expected: RowResult) -> bool:
    def near(a: float, b: float) -> bool:
        return abs(a - b) <= 2 * np.spacing(np.float32(max(abs(a), abs(b), 1.0)))

    tops = zip(got.top_logprobs, expected.top_logprobs, strict=True)
    return (
        got.failure is None
        and got.token == expected.token
        and near(got.logprob, expected.logprob)
        and all(a == c and near(b, d) for (a, b), (c, d) in tops)
    )


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
    """Nearly every token is likely, so the draw walks past what the block maxima can rank."""
    rng = np.random.default_rng(9)
    logits = rng.normal(0, 0.01, 30_000).astype(np.float32)
    params = SamplingParams(temperature=1.5)
    for seed in range(12):
        task = SampleTask(params, seed << 60 | seed, 0, seed, top_logprobs=3)
        assert same(sampled(Sampler(30_000), logits, task), reference.run(logits, task))


def test_a_row_whose_sample_misleads_is_ranked_to_its_end() -> None:
    """Every 37th value is what a guess of the threshold looks at, and only these are high."""
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

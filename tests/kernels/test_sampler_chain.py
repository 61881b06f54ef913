"""Tests of every sampler of a chain: the reference's bits at every level, and a simple model of its definition."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from llamaclust.core.sampler.params import PLAIN_ORDER, SAMPLERS, SamplerChain, SamplerName, SamplingParams
from llamaclust.core.sampler.results import RowResult
from llamaclust.core.sampler.tasks import SampleTask
from llamaclust.kernels import _native
from llamaclust.kernels.reference import exact
from llamaclust.kernels.reference import sampling as reference
from llamaclust.kernels.reference.sampler_chain import repetitions
from llamaclust.kernels.sampling import Sampler
from support.arithmetic.sampled import sampled
from support.arithmetic.sampling_cases import random_logits, random_task, same
from support.seed import SEED

LEVELS = _native.available_levels()
Logits = NDArray[np.float32]


def random_chain(rng: np.random.Generator, vocabulary: int) -> SamplerChain:
    order = [SAMPLERS[i] for i in rng.permutation(len(SAMPLERS))]
    order = sorted(order, key=SAMPLERS.index) if rng.random() < 0.5 else order
    return SamplerChain(
        tuple(order[: rng.integers(2, len(SAMPLERS) + 1)]),
        top_n_sigma=float(rng.choice([0, 0.5, 1, 3])),
        tfs_z=float(rng.choice([1, 0.99, 0.8, 0.0])),
        typical_p=float(rng.choice([1, 0.95, 0.3, 0.0])),
        xtc_probability=float(rng.choice([0, 0.5, 1])),
        xtc_threshold=float(rng.choice([0, 0.01, 0.1, 0.5])),
        dynatemp_range=float(rng.choice([0, 0.4, 2])),
        dynatemp_exponent=float(rng.choice([1, 0.5, 0, 3])),
        dry_multiplier=float(rng.choice([0, 0.8, 5])),
        dry_base=float(rng.choice([1, 1.75, 8])),
        dry_allowed_length=int(rng.choice([0, 1, 2, 4])),
        mirostat=int(rng.choice([0, 0, 1, 2])),
        mirostat_tau=float(rng.uniform(0, 8)),
        mirostat_eta=float(rng.uniform(0, 1)),
        unpenalized=tuple(int(i) for i in rng.integers(0, vocabulary, int(rng.choice([0, 2])))),
    )


def chained_task(rng: np.random.Generator, vocabulary: int) -> SampleTask:
    """Returns a random task whose history has few distinct tokens, so that they repeat."""
    task, chain = random_task(rng, vocabulary), random_chain(rng, vocabulary)
    few = rng.integers(0, vocabulary, 3)
    return replace(
        task,
        params=replace(task.params, chain=chain),
        history=tuple(int(i) for i in rng.choice(few, int(rng.integers(0, 60)))),
        penalty_window=[None, 0, 7][int(rng.integers(3))],
        dry_window=[None, 1, 25][int(rng.integers(3))],
        breakers=tuple(tuple(int(i) for i in rng.choice(few, int(n))) for n in rng.integers(1, 4, rng.integers(3))),
        mu=float(rng.uniform(0, 12)),
    )


def checked(got: RowResult, expected: RowResult, task: SampleTask) -> None:
    assert same(got, expected) and got.mu == expected.mu, f"{task}: {got} for {expected}"


@pytest.mark.parametrize("vocabulary", [1, 2, 65, 700])
@pytest.mark.parametrize("level", LEVELS)
def test_any_chain_gives_the_bits_of_the_reference(level: str, vocabulary: int) -> None:
    print(f"seed {SEED}")
    rng = np.random.default_rng([SEED, vocabulary])
    sampler = Sampler(vocabulary, level)
    for _ in range(60):
        logits, task = random_logits(rng, vocabulary), chained_task(rng, vocabulary)
        if not (task.suppressed and vocabulary == 1):
            checked(sampled(sampler, logits, task), reference.run(logits, task), task)


def test_all_levels_thread_counts_and_batches_give_the_same_bits() -> None:
    rng = np.random.default_rng(3)
    rows = np.stack([random_logits(rng, 20_001) for _ in range(12)])
    tasks = tuple(chained_task(rng, 20_001) for _ in range(12))
    batched = {(level, n): Sampler(20_001, level, n).run(rows, tasks) for level in LEVELS for n in (1, 2)}
    assert len(set(batched.values())) == 1
    alone = Sampler(20_001, LEVELS[-1])
    assert tuple(sampled(alone, row, task) for row, task in zip(rows, tasks, strict=True)) == batched["generic", 1]


def test_the_plain_samplers_as_a_chain_choose_the_same_tokens() -> None:
    rng = np.random.default_rng(4)
    sampler = Sampler(700)
    for _ in range(300):
        logits, plain = random_logits(rng, 700), random_task(rng, 700)
        chain = SamplerChain(PLAIN_ORDER)
        chained = replace(plain, params=replace(plain.params, chain=chain))
        assert sampled(sampler, logits, plain) == sampled(sampler, logits, chained)


# -- definitions of the samplers, in float64
# -----------------------------------------------------------------------------


def probabilities(logits: Logits) -> NDArray[np.float64]:
    shares = np.exp(logits.astype(np.float64) - float(logits.max()))
    normalized: NDArray[np.float64] = shares / shares.sum()
    return normalized


def possible(
    logits: Logits, order: tuple[SamplerName, ...], history: tuple[int, ...] = (), **settings: float
) -> set[int]:
    """Returns the tokens that any of 3000 draws chooses."""
    chain = SamplerChain(order, **settings)  # type: ignore[arg-type]
    params = SamplingParams(temperature=1.0, chain=chain)
    tasks = tuple(SampleTask(params, 5, 0, position, history) for position in range(3000))
    results = Sampler(len(logits)).run(np.tile(logits, (len(tasks), 1)), tasks)
    return {result.token for result in results}


def few_logits(seed: int) -> Logits:
    return np.random.default_rng([SEED, seed]).normal(0, 1, 12).astype(np.float32)


@pytest.mark.parametrize("seed", range(4))
def test_top_n_sigma_keeps_what_is_near_the_best(seed: int) -> None:
    x = few_logits(seed)
    expected = set(np.flatnonzero(x >= x.max() - 1.2 * x.astype(np.float64).std()))
    assert possible(x, (SamplerName.TOP_N_SIGMA,), top_n_sigma=1.2) == expected


def test_top_n_sigma_does_not_count_what_a_bias_forbids() -> None:
    x = few_logits(9)
    expected = possible(x, (SamplerName.TOP_N_SIGMA,), top_n_sigma=1.0)
    assert possible(np.append(x, np.float32(-1e9)), (SamplerName.TOP_N_SIGMA,), top_n_sigma=1.0) == expected


@pytest.mark.parametrize("seed", range(4))
def test_typical_keeps_what_surprises_most_like_the_mean(seed: int) -> None:
    p = probabilities(x := few_logits(seed))
    distance = np.abs(-np.log(p) + (p * np.log(p)).sum())
    order = np.argsort(distance)
    count = int(np.searchsorted(np.cumsum(p[order]), 0.6)) + 1
    assert possible(x, (SamplerName.TYPICAL_P,), typical_p=0.6) == set(order[:count])


@pytest.mark.parametrize("seed", range(4))
def test_tail_free_cuts_where_the_curve_is_flat(seed: int) -> None:
    p = probabilities(x := few_logits(seed))
    order = np.argsort(-p)
    bends = np.abs(np.diff(p[order], 2))
    count = max(1, int(np.searchsorted(np.cumsum(bends / bends.sum()), 0.9, side="right")))
    assert possible(x, (SamplerName.TFS_Z,), tfs_z=0.9) == set(order[:count])


@pytest.mark.parametrize("seed", range(4))
def test_xtc_takes_out_the_likely_ones_but_the_last(seed: int) -> None:
    p = probabilities(x := few_logits(seed))
    likely = [int(i) for i in np.argsort(-p) if p[i] >= 0.1]
    expected = set(range(12)) - set(likely[:-1])
    assert possible(x, (SamplerName.XTC,), xtc_probability=1.0, xtc_threshold=0.1) == expected
    assert possible(x, (SamplerName.XTC,), xtc_probability=1.0, xtc_threshold=0.6) == set(range(12))


def test_xtc_acts_as_often_as_is_asked_and_independently_of_the_draw() -> None:
    x = np.log(np.array([0.5, 0.3, 0.2], np.float32))
    chain = SamplerChain((SamplerName.XTC,), xtc_probability=0.25, xtc_threshold=0.2)
    tasks = tuple(SampleTask(SamplingParams(1.0, chain=chain), 8, 0, i) for i in range(20_000))
    tokens = [result.token for result in Sampler(3).run(np.tile(x, (len(tasks), 1)), tasks)]
    counts = np.bincount(tokens, minlength=3) / len(tasks)
    assert counts == pytest.approx([0.75 * 0.5, 0.75 * 0.3, 0.75 * 0.2 + 0.25], abs=0.015)


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0])
def test_the_temperature_goes_with_the_entropy(exponent: float) -> None:
    x = few_logits(5)
    p = probabilities(x)
    share = -(p * np.log(p)).sum() / np.log(12)
    temperature = 0.2 + 1.6 * share**exponent
    expected = probabilities((x / temperature).astype(np.float32))
    chain = SamplerChain((SamplerName.TEMPERATURE,), dynatemp_range=0.8, dynatemp_exponent=exponent)
    tasks = tuple(SampleTask(SamplingParams(1.0, chain=chain), 8, 0, i) for i in range(20_000))
    tokens = [result.token for result in Sampler(12).run(np.tile(x, (len(tasks), 1)), tasks)]
    assert np.bincount(tokens, minlength=12) / len(tasks) == pytest.approx(expected, abs=0.015)


@pytest.mark.parametrize("version", [1, 2])
def test_mirostat_keeps_the_surprise_near_its_aim(version: int) -> None:
    """Draws from a Zipf distribution; averages the surprises of 350 tokens."""
    x = -np.log(np.arange(1, 3001, dtype=np.float64)).astype(np.float32)
    p, sampler = probabilities(x), Sampler(3000)
    for tau in (2.0, 4.0):
        chain = SamplerChain((SamplerName.TEMPERATURE,), mirostat=version, mirostat_tau=tau, mirostat_eta=0.1)
        mu, surprises = chain.first_mu, []
        for position in range(400):
            result = sampled(sampler, x, SampleTask(SamplingParams(1.0, chain=chain), 3, 0, position, mu=mu))
            assert result.mu is not None
            surprises.append(tau + (mu - result.mu) / chain.mirostat_eta)
            mu = result.mu
        assert np.mean(surprises[50:]) == pytest.approx(tau, abs=0.3)
        assert min(surprises) >= -1e-9 and max(surprises) <= -np.log2(p.min())


def test_dry_costs_what_a_repetition_is_long() -> None:
    """The history is ... 5 6 7 8 ... 5 6 7, so an 8 would extend a repetition to four tokens."""
    history = (1, 5, 6, 7, 8, 2, 6, 7, 3, 5, 6, 7)
    assert repetitions(history, (), 2) == {8: 3, 3: 2}
    assert repetitions(history, (), 3) == {8: 3}
    assert repetitions(history, ((6,),), 2) == {}
    assert repetitions(history, ((6,),), 1) == {8: 1, 3: 1}
    assert repetitions(history, ((8,),), 1) == {3: 2}
    assert repetitions(history, ((5, 6),), 1) == {8: 1, 3: 1}
    x = np.zeros(10, np.float32)
    chain = SamplerChain((SamplerName.DRY,), dry_multiplier=2.0, dry_base=3.0, dry_allowed_length=2)
    task = SampleTask(SamplingParams(0.0, chain=chain), 1, 0, 0, history)
    for token, penalty in ((8, 6.0), (3, 2.0)):
        for more, chosen in ((-0.01, 0), (0.01, token)):
            x[:] = 0
            x[token] = penalty + more
            greedy = replace(
                task,
                params=replace(task.params, chain=replace(chain, order=(SamplerName.DRY, SamplerName.TEMPERATURE))),
            )
            assert sampled(Sampler(10), x, greedy).token == chosen


def test_a_line_break_may_be_spared_by_penalties() -> None:
    x = np.array([0.0, 1.0, 0.5], np.float32)
    chain = SamplerChain(PLAIN_ORDER, unpenalized=(1,))
    for chained, token in ((None, 2), (chain, 1)):
        params = SamplingParams(0.0, presence_penalty=0.6, chain=chained)
        assert sampled(Sampler(3), x, SampleTask(params, 1, 0, 0, history=(1, 1))).token == token


def test_the_order_counts() -> None:
    """Top-k before top-p increases the best token's share of the remaining probability."""
    x = np.log(np.array([0.4, 0.3, 0.2, 0.1], np.float32))
    params = SamplingParams(1.0, top_k=2, top_p=0.55)
    for order, kept in (
        ((SamplerName.TOP_K, SamplerName.TOP_P), {0}),
        ((SamplerName.TOP_P, SamplerName.TOP_K), {0, 1}),
    ):
        chained = replace(params, chain=SamplerChain(order))
        results = Sampler(4).run(np.tile(x, (300, 1)), tuple(SampleTask(chained, 1, 0, i) for i in range(300)))
        assert {result.token for result in results} == kept


def test_extreme_values_end_in_a_token_or_a_failure() -> None:
    rng = np.random.default_rng([SEED, 6])
    largest: dict[str, Any] = {
        "mirostat_tau": 100.0,
        "mirostat_eta": 100.0,
        "dry_multiplier": 1000.0,
        "dry_base": 1000.0,
    }
    for _ in range(300):
        task = chained_task(rng, 50)
        chain = replace(task.params.chain, **largest) if task.params.chain else None
        params = replace(task.params, chain=chain, temperature=float(rng.choice([0, 1e-45, 100])))
        logits = (rng.choice([0, 1, -1], 50) * rng.choice([1, 1e30, 3e38], 50)).astype(np.float32)
        for mu in (-1e12, 1e12):
            result = sampled(Sampler(50), logits, replace(task, params=params, mu=mu))
            assert 0 <= result.token < 50 or result.failure == "every token is suppressed"


# -- elementary functions ----------------------------------------------------------------------------------------------


def test_the_references_exponential_has_the_kernels_bits() -> None:
    rng = np.random.default_rng([SEED, 7])
    x = np.concatenate([rng.uniform(-104, 89, 4000), rng.uniform(-1, 1, 4000), [-1e30, -104, 89, 88.8]]).astype(
        np.float32
    )
    out = np.empty_like(x)
    _native.exp(x, out, "generic")
    with np.errstate(over="ignore"):
        assert exact.exp32(x).tobytes() == out.tobytes()


def test_exp_of_a_float64_is_within_1e_15_and_has_the_references_bits() -> None:
    rng = np.random.default_rng([SEED, 8])
    for x in (*rng.uniform(-745, 709, 200), *rng.uniform(-1, 1, 200), 0.0, -750.0):
        value = _native.exp_double(float(x))
        assert value == exact.exp64(float(x))
        assert value == pytest.approx(float(np.exp(np.longdouble(x))), rel=1e-15, abs=1e-320)
    assert _native.exp_double(720.0) == exact.exp64(720.0) == np.inf


def test_the_references_logarithm_has_the_kernels_bits() -> None:
    rng = np.random.default_rng([SEED, 10])
    for x in (*np.exp(rng.uniform(-300, 300, 200)), *rng.uniform(0.5, 2, 200), 1.0, 0.0):
        assert _native.log(float(x)) == exact.log64(float(x))


def test_every_setting_of_a_chain_is_varied_here() -> None:
    rng = np.random.default_rng(1)
    chains = [random_chain(rng, 100) for _ in range(100)]
    for one in fields(SamplerChain):
        assert len({getattr(chain, one.name) for chain in chains}) > 1, one.name

"""The steps of a sampler chain in simple Python, with the same bits as kernels/cpu/native/sampler/chain.cpp. A step's
function has the name of the sampler."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

import numpy as np

from llamaclust.core.sampler.params import SamplerChain, SamplingParams
from llamaclust.core.sampler.tasks import SampleTask
from llamaclust.kernels.backend import Float32
from llamaclust.kernels.reference.candidates import LARGEST, UNIT_WEIGHT, Candidates, random_bits, ranked
from llamaclust.kernels.reference.exact import LN2, exp64, log64

_FAR_BELOW = 1e6
_MIROSTAT_TOKENS = 100


def choose(logits: Float32, task: SampleTask, chain: SamplerChain) -> tuple[int, float | None]:
    """Returns the chosen token and the next mu of Mirostat, which is None without Mirostat."""
    row = Candidates(logits, task, chain)
    for step in chain.order:
        globals()[step](row)
    if chain.mirostat == 0:
        return int(row.order[_draw(row)]), None
    row.weigh()
    if chain.mirostat == 1:
        row.keep(_mirostat_candidates(row))
    else:
        surprising = (i for i, x in enumerate(row.information()) if i > 0 and x / LN2 > task.mu)
        row.keep(next(surprising, len(row.order)))
    chosen = _draw(row)
    surprise = -log64(float(row.w[chosen]) / float(sum(row.w))) / LN2
    return int(row.order[chosen]), task.mu - chain.mirostat_eta * (surprise - chain.mirostat_tau)


def _draw(row: Candidates) -> int:
    """Draws with the inverse CDF, in the order of candidates. (random bits * sum) >> 64 is uniform in [0, sum)."""
    target = (random_bits(row.task) * sum(row.weigh())) >> 64
    return next(rank for rank, so_far in enumerate(accumulate(row.w)) if so_far > target)


def _newest(history: Sequence[int], window: int | None) -> tuple[int, ...]:
    return tuple(history if window is None else history[max(0, len(history) - window) :])


def penalties(row: Candidates) -> None:
    params, history = row.task.params, _newest(row.task.history, row.task.penalty_window)

    def penalize(x: Float32) -> None:
        for token in set(history).difference(row.chain.unpenalized):
            x[token] = _penalized(x[token], history.count(token), params)

    if params.needs_history and row.task.history:
        row.change(penalize)


def _penalized(logit: np.float32, count: int, params: SamplingParams) -> np.float32:
    factor = np.float32(params.repetition_penalty)
    logit = logit * factor if logit <= 0 else logit / factor
    penalty = np.float32(count) * np.float32(params.frequency_penalty) + np.float32(params.presence_penalty)
    return np.float32(logit - penalty)


def dry(row: Candidates) -> None:
    chain, task = row.chain, row.task

    def penalize(x: Float32) -> None:
        found = repetitions(_newest(task.history, task.dry_window), task.breakers, chain.dry_allowed_length)
        for token, length in found.items():
            penalty = chain.dry_multiplier * _power(chain.dry_base, length - chain.dry_allowed_length)
            x[token] -= np.float32(min(penalty, float(LARGEST)))

    if chain.dry_multiplier > 0:
        row.change(penalize)


def repetitions(history: tuple[int, ...], breakers: tuple[tuple[int, ...], ...], allowed_length: int) -> dict[int, int]:
    """Maps each token that would continue a repetition (DRY) to the repetition's length, at least `allowed_length`.
    For example, the token c has length 2 after "a b c a b". A repetition contains none of the `breakers`."""
    reach = _reach(history, breakers)
    if len(history) <= allowed_length or reach < allowed_length:
        return {}
    longest: dict[int, int] = {}
    for end in range(len(history) - 1):
        length = 0
        while length < min(reach, end + 1) and history[end - length] == history[-1 - length]:
            length += 1
        if length >= allowed_length:
            token = history[end + 1]
            longest[token] = max(longest.get(token, 0), length)
    return {token: length for token, length in longest.items() if (token,) not in breakers}


def _reach(history: tuple[int, ...], breakers: tuple[tuple[int, ...], ...]) -> int:
    for start in reversed(range(len(history))):
        found = [len(tokens) for tokens in breakers if history[start : start + len(tokens)] == tokens]
        if found:
            return len(history) - start - max(found)
    return len(history)


def _power(base: float, exponent: int) -> float:
    power, square = 1.0, base
    while exponent > 0:
        if exponent & 1:
            power *= square
        square *= square
        exponent >>= 1
    return power


def top_n_sigma(row: Candidates) -> None:
    if row.chain.top_n_sigma <= 0:
        return
    row.change(lambda x: None)
    x = row.values.astype(np.float64)
    greatest = float(x.max())
    counted = [float(v) for v in x if v >= greatest - _FAR_BELOW]
    mean = list(accumulate(counted))[-1] / len(counted)
    squares = list(accumulate((v - mean) * (v - mean) for v in counted))[-1]
    row.values[x < greatest - row.chain.top_n_sigma * math.sqrt(squares / len(counted))] = -np.inf
    row.order = ranked(row.values)


def top_k(row: Candidates) -> None:
    if row.task.params.top_k > 0:
        row.keep(row.task.params.top_k)


def tfs_z(row: Candidates) -> None:
    if row.chain.tfs_z >= 1 or len(row.order) <= 2:
        return
    w = row.weigh()
    bends = [abs(a - 2 * b + c) for a, b, c in zip(w, w[1:], w[2:], strict=False)]
    bends = bends if any(bends) else [1] * len(bends)
    enough = row.chain.tfs_z * float(sum(bends))
    sums = enumerate(accumulate(bends))
    row.keep(next((rank for rank, s in sums if rank > 0 and float(s) > enough), len(w)))


def typ_p(row: Candidates) -> None:
    if row.chain.typical_p >= 1:
        return
    w, mean, information = row.weigh(), row.entropy(), row.information()
    by_distance = sorted(range(len(w)), key=lambda rank: (abs(information[rank] - mean), rank))
    count = _count_of_share([w[rank] for rank in by_distance], row.chain.typical_p)
    row.order = row.order[sorted(by_distance[:count])]


def _count_of_share(w: list[int], share: float) -> int:
    enough = share * float(sum(w))
    return next((count for count, so_far in enumerate(accumulate(w), 1) if float(so_far) >= enough), len(w))


def top_p(row: Candidates) -> None:
    if row.task.params.top_p < 1:
        row.keep(_count_of_share(row.weigh(), row.task.params.top_p))


def min_p(row: Candidates) -> None:
    if row.task.params.min_p > 0:
        least, w = row.task.params.min_p * UNIT_WEIGHT, row.weigh()
        row.keep(next((rank for rank, weight in enumerate(w) if rank > 0 and weight < least), len(w)))


def xtc(row: Candidates) -> None:
    chain = row.chain
    if chain.xtc_probability <= 0 or chain.xtc_threshold > 0.5:
        return
    if (random_bits(row.task, 1) >> 11) * 2.0**-53 >= chain.xtc_probability:
        return
    w = row.weigh()
    least = chain.xtc_threshold * float(sum(w))
    probable = next((rank for rank, weight in enumerate(w) if weight < least), len(w))
    row.order = row.order[max(0, probable - 1) :]


def temperature(row: Candidates) -> None:
    wanted = float(np.float32(row.task.params.temperature))
    if row.chain.dynatemp_range > 0 and len(row.order) > 1:
        wanted = _dynamic_temperature(row, wanted)
    row.divisor = float(min(np.float32(wanted), LARGEST))
    if row.divisor == 0:
        row.divisor = 1.0
        row.keep(1)


def _dynamic_temperature(row: Candidates, temperature: float) -> float:
    row.weigh()
    share = min(1.0, max(0.0, row.entropy() / log64(float(len(row.order)))))
    exponent = row.chain.dynatemp_exponent
    low, high = max(0.0, temperature - row.chain.dynatemp_range), temperature + row.chain.dynatemp_range
    if share == 0:
        return low + (high - low) * (1.0 if exponent == 0 else 0.0)
    return low + (high - low) * exp64(exponent * log64(share))


def _mirostat_candidates(row: Candidates) -> int:
    size = len(row.order)
    if size < 2:
        return 1
    x = row.values[row.order].astype(np.float64)
    products = squares = 0.0
    for i in range(min(size, _MIROSTAT_TOKENS) - 1):
        t = log64((i + 2.0) / (i + 1.0))
        products += t * (float(x[i] - x[i + 1]) / row.divisor)
        squares += t * t
    exponent = products / squares
    if not exponent > 0:
        return size
    excess, log_n = exponent - 1, log64(float(len(row.values)))
    shape = 1 / log_n if abs(excess) < 1e-9 else excess / (1 - exp64(-excess * log_n))
    count = exp64((log64(shape) + row.task.mu * LN2) / exponent)
    return size if count >= size else max(1, int(count))

"""The sampler's rules in NumPy, slow and obvious: what kernels/sampling.py is tested against.

Python integers and float32 steps follow docs/numerics.md; only exp is NumPy's (float64, rounded), so a weight may
differ by a unit in the last place.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from llamaclust.wire.messages import RowResult, RowTask, SampleTask, SamplingParams

Float32 = NDArray[np.float32]

UNIT_WEIGHT = 1 << 40
_MASK = 0xFFFFFFFF


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox4x32-10: four random 32-bit numbers that depend on counter and key alone."""
    c, k = counter, key
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = ((b >> 32) ^ c[1] ^ k[0], b & _MASK, (a >> 32) ^ c[3] ^ k[1], a & _MASK)
        k = ((k[0] + 0x9E3779B9) & _MASK, (k[1] + 0xBB67AE85) & _MASK)
    return c


def logprobs(logits: Float32) -> Float32:
    """Log-softmax of raw logits [vocabulary]."""
    x = logits.astype(np.float64)
    shifted = x - x.max()
    return np.asarray(shifted - math.log(np.exp(shifted).sum()), dtype=np.float32)


def adjust(logits: Float32, task: SampleTask) -> Float32:
    """Logits after bias, penalties and suppression, each step in float32."""
    params, x = task.params, logits.copy()
    for token, bias in params.logit_bias:
        x[token] += np.float32(bias)
    if params.needs_history:
        for token in set(task.history):
            x[token] = _penalized(x[token], task.history.count(token), params)
    x[list(task.suppressed)] = -np.inf
    return x


def _penalized(logit: np.float32, count: int, params: SamplingParams) -> np.float32:
    factor = np.float32(params.repetition_penalty)
    logit = logit * factor if logit <= 0 else logit / factor
    penalty = np.float32(count) * np.float32(params.frequency_penalty) + np.float32(params.presence_penalty)
    return np.float32(logit - penalty)


def ranked(logits: Float32) -> NDArray[np.int64]:
    """Ids ordered by (value descending, id ascending), without those at -infinity."""
    order = np.lexsort((np.arange(len(logits)), -logits))
    return order[np.isfinite(logits[order])]


def weights(logits: Float32, maximum: np.float32, temperature: float) -> list[int]:
    """exp((x - maximum) / temperature) as integers in units of 2^-40, so that sums are exact."""
    scaled = (logits - maximum) / np.float32(temperature)
    exact = np.exp(scaled.astype(np.float64)).astype(np.float32)
    return [int(w) for w in np.rint(exact.astype(np.float64) * UNIT_WEIGHT)]


def keep(logits: Float32, params: SamplingParams) -> NDArray[np.int64]:
    """Candidates that top-k, top-p and min-p leave, best first."""
    order = ranked(logits)
    if 0 < params.top_k < len(order):
        order = order[: params.top_k]
    w = weights(logits[order], logits[order[0]], 1.0)
    total, so_far = sum(w), 0
    for rank, weight in enumerate(w):
        if rank > 0 and weight < params.min_p * UNIT_WEIGHT:
            return order[:rank]
        so_far += weight
        if params.top_p < 1 and float(so_far) >= params.top_p * float(total):
            return order[: rank + 1]
    return order


def draw(logits: Float32, order: NDArray[np.int64], task: SampleTask) -> int:
    """Inverse CDF over candidates in order, at the task's temperature."""
    w = weights(logits[order], logits[order[0]], task.params.temperature)
    low, high, _, _ = philox((task.position, task.choice, 0, 0), (task.seed & _MASK, task.seed >> 32))
    target = ((high << 32 | low) * sum(w)) >> 64
    for token, weight in zip(order, w, strict=True):
        if target < weight:
            return int(token)
        target -= weight
    raise AssertionError("the target is below the sum")


def choose(logits: Float32, task: SampleTask) -> int:
    x = adjust(logits, task)
    if task.params.temperature == 0:
        return int(np.argmax(x))
    return draw(x, keep(x, task.params), task)


def run(logits: Float32, task: RowTask) -> RowResult:
    """The result for one row [vocabulary] of finite logits."""
    token = choose(logits, task) if isinstance(task, SampleTask) else task.token
    lp = logprobs(logits)
    top = tuple((int(i), float(lp[i])) for i in ranked(logits)[: task.top_logprobs])
    return RowResult(token, float(lp[token]), top)

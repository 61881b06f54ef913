"""The sampler's rules in NumPy, slow and obvious: what kernels/sampling.py is tested against.

Python integers, float32 steps and exp follow docs/numerics.md bit for bit; logprobs are NumPy's, so one may differ by a
unit in the last place.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from llamaclust.core.sampling import RowResult, RowTask, SampleTask, SamplingParams
from llamaclust.kernels.reference.sampler_chain import ChainRun
from llamaclust.kernels.reference.sampling_steps import UNIT_WEIGHT, penalize, random_bits, ranked, scaled, weights

Float32 = NDArray[np.float32]


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
        penalize(x, task.history, params)
    x[list(task.suppressed)] = -np.inf
    return x


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
    target = scaled(random_bits(task), sum(w))
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


def chained(logits: Float32, task: SampleTask) -> tuple[int, float | None]:
    """The token that a chain chooses, and Mirostat's mu."""
    assert task.params.chain is not None
    x = logits.copy()
    for token, bias in task.params.logit_bias:
        x[token] += np.float32(bias)
    x[list(task.suppressed)] = -np.inf
    return ChainRun(x, task, task.params.chain).choose()


def run(logits: Float32, task: RowTask) -> RowResult:
    """The result for one row [vocabulary] of finite logits."""
    mu = None
    if not isinstance(task, SampleTask):
        token = task.token
    elif task.params.chain is None:
        token = choose(logits, task)
    else:
        token, mu = chained(logits, task)
    lp = logprobs(logits)
    top = tuple((int(i), float(lp[i])) for i in ranked(logits)[: task.top_logprobs])
    return RowResult(token, float(lp[token]), top, mu=mu)

"""The sampler's rules in NumPy, for tests. Integers, float32 steps and exp follow docs/internals/numerics.md bit for
bit. Logprobs use NumPy's functions and may differ by a unit in the last place."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from llamaclust.core.sampler.params import SamplerChain
from llamaclust.core.sampler.results import RowResult
from llamaclust.core.sampler.tasks import RowTask, SampleTask
from llamaclust.kernels.backend import Float32
from llamaclust.kernels.reference.candidates import ranked
from llamaclust.kernels.reference.sampler_chain import choose


def logprobs(logits: Float32) -> Float32:
    x = logits.astype(np.float64)
    shifted = x - x.max()
    return np.asarray(shifted - math.log(np.exp(shifted).sum()), dtype=np.float32)


def run(logits: Float32, task: RowTask, allowed: NDArray[np.bool_] | None = None) -> RowResult:
    """Returns the result for one row [vocabulary] of finite logits. A task without a chain uses the default chain."""
    if isinstance(task, SampleTask):
        x = logits.copy()
        for token, bias in task.params.logit_bias:
            x[token] += np.float32(bias)
        x[list(task.suppressed)] = -np.inf
        if allowed is not None:
            x[~allowed] = -np.inf
        token, mu = choose(x, task, task.params.chain or SamplerChain())
    else:
        token, mu = task.token, None
    lp = logprobs(logits)
    top = tuple((int(i), float(lp[i])) for i in ranked(logits)[: task.top_logprobs])
    return RowResult(token, float(lp[token]), top, mu=mu)

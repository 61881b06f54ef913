"""Random logits, sampling tasks and values within the sampling table's bounds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from llamaclust.core.sampler.fields import SamplingField
from llamaclust.core.sampler.params import SamplingParams
from llamaclust.core.sampler.results import RowResult
from llamaclust.core.sampler.tasks import SampleTask

Logits = NDArray[np.float32]


def numbers_within(rows: Mapping[str, SamplingField]) -> dict[str, Any]:
    """Returns a strategy for each row of the table."""
    return {
        name: st.integers(int(row.low), int(row.high)) if row.is_whole else st.floats(row.low, row.high)
        for name, row in rows.items()
    }


def random_logits(rng: np.random.Generator, vocabulary: int) -> Logits:
    """Returns logits of one of several scales; a third of the rows are on a coarse grid, so that values tie."""
    x = rng.normal(0, rng.choice([0.3, 2.0, 8.0]), vocabulary).astype(np.float32)
    return np.round(x * 4).astype(np.float32) / np.float32(4) if rng.random() < 0.33 else x


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
        return bool(abs(a - b) <= 2 * np.spacing(np.float32(max(abs(a), abs(b), 1.0))))

    tops = zip(got.top_logprobs, expected.top_logprobs, strict=True)
    return (
        got.failure is None
        and got.token == expected.token
        and near(got.logprob, expected.logprob)
        and all(a == c and near(b, d) for (a, b), (c, d) in tops)
    )

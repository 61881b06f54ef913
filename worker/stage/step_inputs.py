"""Sampling inputs at the last stage. Native code reads and checks everything except the matchers' starts."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from llamaclust.core import limits
from llamaclust.core.sampler import bounds
from llamaclust.core.sampler.matchers import MatcherStart
from llamaclust.core.sampler.params import CHAIN, PARAMS
from llamaclust.kernels._native import InputsReader, SamplingTasks
from llamaclust.wire.microbatch.codec import MAX_INPUTS_BYTES, MAX_INPUTS_TOKENS, MAX_RELEASED
from llamaclust.wire.microbatch.matchers import starts_in


@cache
def _reader() -> InputsReader:
    return InputsReader(
        max_rows=limits.MAX_BATCH_TOKENS,
        max_context_tokens=bounds.MAX_CONTEXT_TOKENS,
        max_vocabulary=bounds.MAX_VOCABULARY,
        max_top_logprobs=limits.MAX_TOP_LOGPROBS,
        max_released=MAX_RELEASED,
        max_breakers=bounds.MAX_BREAKERS,
        max_breaker_tokens=bounds.MAX_BREAKER_TOKENS,
        max_tokens=MAX_INPUTS_TOKENS,
        max_bytes=MAX_INPUTS_BYTES,
        max_bias=bounds.MAX_BIAS,
        max_mu=bounds.MAX_MU,
        params=[(row.low, row.high) for row in PARAMS.values()],
        chain=[(row.low, row.high) for row in CHAIN.values()],
    )


@dataclass(frozen=True, slots=True)
class StepInputs:
    tasks: SamplingTasks
    starts: tuple[MatcherStart, ...]  # Matchers for answers whose rows are in this microbatch or in later microbatches.

    @classmethod
    def read(cls, data: bytes) -> StepInputs:
        tasks = _reader().read(data)
        starts = tasks.starts
        return cls(tasks, starts_in(starts) if starts else ())

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil
from runner.case import Case, Group, Measures, argument, option
from runner.clusters import processor_s
from runner.in_process import cluster_of, pinned_to_cores, prompts, run
from runner.options import existing, positive

from llamaclust.cluster.engine.metrics import StageReport
from llamaclust.cluster.server.coordinator import Cluster

_REQUESTS = 8
_PROMPT_TOKENS = 512
_GOALS = {"alone tok/s": ">= 0.93 (1.1B: 0.985)", "prefill s": "<= 0.53", "of 8 tok/s": ">= 1.15 (1.2)", "of bound": ""}


@dataclass(frozen=True)
class Split(Case):
    """Compares two workers of one thread each with one worker of one thread.
    The case measures decode of one request, prefill of 8 prompts of 512 tokens, and decode of 8 requests. `of bound` is
    the speed with 8 requests as a share of the maximum that the stages' computing times allow. `beside ms` is the
    workers' processor time per token without computing. A turn takes half a minute with a model of 135M parameters."""

    warm = 1
    model: Path = argument("path of a .gguf", existing)
    tokens: int = option(64, "number of tokens in an answer", positive)
    pin: bool = option(False, "pin each process to a core during the single request")

    async def groups(self) -> AsyncIterator[Group]:
        async with cluster_of(1, self.model) as one, cluster_of(2, self.model) as two:
            variants = {"one worker": partial(self._measure, one), "two workers": partial(self._measure, two)}
            yield Group("", variants, _GOALS)

    async def _measure(self, cluster: Cluster, turn: int) -> Measures:
        vocabulary, source = cluster.model.hyperparameters.vocabulary_size, random.Random(turn)
        with pinned_to_cores(cluster) if self.pin else nullcontext():
            alone = await run(cluster, prompts(source, 1, 16, vocabulary)[0], self.tokens)
        prefill_s = await _together_s(cluster, prompts(source, _REQUESTS, _PROMPT_TOKENS, vocabulary), 1)
        before, used_s = cluster.engine.metrics.stage_report(), _workers_s(cluster)
        together_s = await _together_s(cluster, prompts(source, _REQUESTS, 1, vocabulary), self.tokens)
        rows, stage_ms = _difference(before, after := cluster.engine.metrics.stage_report())
        computed_ms = sum(stage_ms) * (after[0].microbatches - before[0].microbatches)
        bound = _REQUESTS / max(_REQUESTS / rows * max(stage_ms), sum(stage_ms)) * 1e3
        tokens = _REQUESTS * self.tokens
        return {
            "alone tok/s": alone.timings.decode_tok_s,
            "prefill s": prefill_s,
            "of 8 tok/s": tokens / together_s,
            "of bound": tokens / together_s / bound,
            "rows": rows,
            "beside ms": (1e3 * (_workers_s(cluster) - used_s) - computed_ms) / tokens,
            "stages ms": " ".join(f"{ms:.2f}" for ms in stage_ms),
        }


async def _together_s(cluster: Cluster, requested: Sequence[tuple[int, ...]], tokens: int) -> float:
    begun_s = time.perf_counter()
    await asyncio.gather(*(run(cluster, prompt, tokens) for prompt in requested))
    return time.perf_counter() - begun_s


def _workers_s(cluster: Cluster) -> float:
    return sum(processor_s(psutil.Process(worker.registration.pid)) for worker in cluster.registry.present.values())


def _difference(before: Sequence[StageReport], after: Sequence[StageReport]) -> tuple[float, tuple[float, ...]]:
    count = after[0].microbatches - before[0].microbatches
    pairs = zip(before, after, strict=True)
    times = (b.compute_ms * b.microbatches - a.compute_ms * a.microbatches for a, b in pairs)
    return (after[0].rows - before[0].rows) / count, tuple(ms / count for ms in times)

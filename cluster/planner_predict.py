"""What a plan should bring: milliseconds per token, time to the first token, throughput, the limiting worker."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from llamaclust.cluster.costs import StageCosts, WorkerFacts
from llamaclust.cluster.plan import Plan
from llamaclust.cluster.scheduler_split import cycle_ns

_PROMPT_TOKENS = 512
_CHUNKS = (1, 2, 4, 8, 16)
_NS = 1e6


def predict(plan: Plan, costs: StageCosts, workers: Sequence[WorkerFacts], max_sequences: int, hop_ms: float) -> Plan:
    """The plan with its times. `workers` are those of its stages, all measured."""
    ranges = [(worker, stage.start, stage.end) for worker, stage in zip(workers, plan.stages, strict=True)]
    decode = [costs.decode_ms(*stage) for stage in ranges]
    prefill = [costs.prefill_ms(*stage, _PROMPT_TOKENS) / _PROMPT_TOKENS for stage in ranges]
    round_ms = hop_ms * (len(ranges) + 1)
    slowest = max(range(len(ranges)), key=lambda i: decode[i])
    timed = zip(plan.stages, decode, prefill, strict=True)
    return replace(
        plan,
        stages=tuple(replace(stage, decode_ms=ms, prefill_ms=each) for stage, ms, each in timed),
        token_ms=sum(decode) + round_ms,
        ttft_ms=min(_ttft_ms(costs, ranges, chunks, round_ms) for chunks in _CHUNKS),
        tokens_per_s=max(_tokens_per_s(costs, ranges, max_sequences, groups, round_ms) for groups in _CHUNKS),
        limiting=plan.stages[slowest].worker,
    )


def _ttft_ms(costs: StageCosts, ranges: Sequence[tuple[WorkerFacts, int, int]], chunks: int, round_ms: float) -> float:
    """A prompt in equal chunks, one behind the other through the stages; the last stage's head for its last row."""
    times = [costs.prefill_ms(*stage, _PROMPT_TOKENS // chunks) for stage in ranges]
    worker, start, end = ranges[-1]
    head_ms = costs.decode_ms(worker, start, end) - costs.prefill_ms(worker, start, end, 1)
    return sum(times) + (chunks - 1) * max(times) + max(head_ms, 0.0) + round_ms


def _tokens_per_s(
    costs: StageCosts, ranges: Sequence[tuple[WorkerFacts, int, int]], sequences: int, groups: int, round_ms: float
) -> float:
    """Decode of that many sequences in that many microbatches."""
    rows = -(-sequences // groups)
    times = [costs.decode_ms(*stage, rows) * _NS for stage in ranges]
    return sequences / cycle_ns(times, groups, round_ms * _NS) * 1e9

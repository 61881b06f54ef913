"""What a plan should bring: milliseconds per token, time to the first token, throughput, the limiting worker."""

from __future__ import annotations

from llamaclust.cluster.costs import StageCosts
from llamaclust.cluster.plan import Prediction, StagePrediction
from llamaclust.cluster.planner_fit import Cut
from llamaclust.cluster.scheduler_split import cycle_ns

_CHUNKS = (1, 2, 4, 8, 16)
_NS = 1e6


def predict(costs: StageCosts, cut: Cut, prompt_tokens: int, max_sequences: int, hop_ms: float) -> Prediction:
    """Of stages whose workers were all measured."""
    stages = tuple(
        StagePrediction(costs.decode_ms(*stage), costs.prefill_ms(*stage, prompt_tokens) / prompt_tokens)
        for stage in cut
    )
    round_ms = hop_ms * (len(cut) + 1)
    slowest = max(range(len(cut)), key=lambda index: stages[index].decode_ms)
    return Prediction(
        stages=stages,
        token_ms=sum(stage.decode_ms for stage in stages) + round_ms,
        ttft_ms=min(_ttft_ms(costs, cut, prompt_tokens, chunks, round_ms) for chunks in _CHUNKS),
        tokens_per_s=max(_tokens_per_s(costs, cut, max_sequences, groups, round_ms) for groups in _CHUNKS),
        limiting=cut[slowest][0].name,
    )


def _ttft_ms(costs: StageCosts, cut: Cut, prompt_tokens: int, chunks: int, round_ms: float) -> float:
    """A prompt in equal chunks, one behind the other through the stages; the last stage's head for its last row."""
    times = [costs.prefill_ms(*stage, -(-prompt_tokens // chunks)) for stage in cut]
    head_ms = costs.decode_ms(*cut[-1]) - costs.prefill_ms(*cut[-1], 1)
    return sum(times) + (chunks - 1) * max(times) + max(head_ms, 0.0) + round_ms


def _tokens_per_s(costs: StageCosts, cut: Cut, sequences: int, groups: int, round_ms: float) -> float:
    """Decode of that many sequences in that many microbatches."""
    rows = -(-sequences // groups)
    times = [costs.decode_ms(*stage, rows) * _NS for stage in cut]
    return sequences / cycle_ns(times, groups, round_ms * _NS) * 1e9

"""What a plan should bring: milliseconds per token, time to the first token, throughput, the limiting worker."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from llamaclust.cluster.planner.costs import StageCosts
from llamaclust.cluster.planner.devices import Held
from llamaclust.cluster.planner.links import COORDINATOR, Links
from llamaclust.cluster.planner.plan import Prediction, StagePrediction
from llamaclust.cluster.scheduler.microbatching import cycle_ns

_CHUNKS = (1, 2, 4, 8, 16)
_NS = 1e6


@dataclass(frozen=True, slots=True)
class _Path:
    """The links that a token takes through the stages."""

    round_ms: float  # from the first stage through all others to the first one again
    there_ms: float  # from the coordinator through all of them to the coordinator
    row_ms: tuple[float, ...]  # what each row adds between stages

    @classmethod
    def of(cls, links: Links, stages: list[str], hidden_bytes: int) -> _Path:
        between = [links.between(one, other) for one, other in pairwise(stages)]
        ends = [links.between(COORDINATOR, stages[0]), links.between(stages[-1], COORDINATOR)]
        return cls(
            round_ms=sum(link.one_way_ms for link in links.round(stages)),
            there_ms=sum(link.one_way_ms for link in (*between, *ends)),
            row_ms=tuple(link.ms_per_mb * hidden_bytes / 1e6 for link in between),
        )


@dataclass(frozen=True, slots=True)
class StageParts:
    """A stage of a worker: what its devices hold, one behind the other."""

    worker: str
    parts: tuple[Held, ...]

    def decode_ms(self, costs: StageCosts, rows: int = 1, *, together: bool = False) -> float:
        return sum(costs.decode_ms(*part, rows, together=together) for part in self.parts)

    def prefill_ms(self, costs: StageCosts, rows: int, *, together: bool = False) -> float:
        return sum(costs.prefill_ms(*part, rows, together=together) for part in self.parts)


def predict(
    costs: StageCosts, cut: Sequence[StageParts], prompt_tokens: int, max_sequences: int, links: Links
) -> Prediction:
    """Of stages whose workers were all measured."""
    path = _Path.of(links, [stage.worker for stage in cut], costs.hidden_bytes)
    stages = tuple(
        StagePrediction(stage.decode_ms(costs), stage.prefill_ms(costs, prompt_tokens) / prompt_tokens) for stage in cut
    )
    slowest = max(range(len(cut)), key=lambda index: stages[index].decode_ms)
    return Prediction(
        stages=stages,
        token_ms=sum(stage.decode_ms for stage in stages) + path.round_ms,
        links_ms=path.round_ms,
        ttft_ms=min(_ttft_ms(costs, cut, prompt_tokens, chunks, path) for chunks in _CHUNKS),
        tokens_per_s=max(_tokens_per_s(costs, cut, max_sequences, groups, path) for groups in _CHUNKS),
        limiting=cut[slowest].worker,
    )


def _ttft_ms(costs: StageCosts, cut: Sequence[StageParts], prompt_tokens: int, chunks: int, path: _Path) -> float:
    """A prompt in equal chunks, one behind the other through stages and links; the last stage's head for its last
    row."""
    rows = -(-prompt_tokens // chunks)
    times = [stage.prefill_ms(costs, rows, together=chunks > 1) for stage in cut]
    sent = [rows * ms for ms in path.row_ms]
    head_ms = cut[-1].decode_ms(costs) - cut[-1].prefill_ms(costs, 1)
    return sum(times) + sum(sent) + (chunks - 1) * max(*times, *sent, 0.0) + max(head_ms, 0.0) + path.there_ms


def _tokens_per_s(costs: StageCosts, cut: Sequence[StageParts], sequences: int, groups: int, path: _Path) -> float:
    """Decode of that many sequences in that many microbatches."""
    rows = -(-sequences // groups)
    times = [stage.decode_ms(costs, rows, together=groups > 1) * _NS for stage in cut]
    sent_ms = rows * sum(path.row_ms)
    cycle = cycle_ns(times, groups, (path.round_ms + sent_ms) * _NS)
    return sequences / max(cycle, 1.0) * 1e9  # 0: what a worker says of itself

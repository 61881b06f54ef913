"""What a stage costs on a worker: bytes of memory, and time by the roofline of measured bandwidth and dot products."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

from llamaclust.model.loader import LayerCost, ModelCosts
from llamaclust.model.program import KV_BLOCK_TOKENS


@dataclass(frozen=True, slots=True)
class WorkerFacts:
    """A worker as the planner sees it; None is what nobody knows."""

    name: str
    memory_bytes: int | None  # what it may take, in all
    read_gb_s: float | None
    int8_gmac_s: float | None
    threads: int = 1


@dataclass(frozen=True, slots=True)
class StageCosts:
    """Sums over layers [start, end) of a model, with embedding and head where they belong."""

    costs: ModelCosts
    _weights: tuple[int, ...]
    _idle: tuple[int, ...]
    _macs: tuple[int, ...]
    _kv: tuple[int, ...]

    @classmethod
    def of(cls, costs: ModelCosts) -> StageCosts:
        def sums(value: Callable[[LayerCost], int]) -> tuple[int, ...]:
            return tuple(accumulate(map(value, costs.layers), initial=0))

        return cls(
            costs,
            sums(lambda layer: layer.weight_bytes),
            sums(lambda layer: layer.idle_bytes),
            sums(lambda layer: layer.macs_per_token),
            sums(lambda layer: layer.kv_bytes_per_token),
        )

    @property
    def layers(self) -> int:
        return len(self.costs.layers)

    def weight_bytes(self, start: int, end: int) -> int:
        embedding = self.costs.embedding_bytes if start == 0 else 0
        return self._weights[end] - self._weights[start] + embedding + self._head(end, self.costs.head_bytes)

    def kv_block_bytes(self, start: int, end: int) -> int:
        """What one KV block takes on the stage."""
        return (self._kv[end] - self._kv[start]) * KV_BLOCK_TOKENS

    def decode_ms(self, worker: WorkerFacts, start: int, end: int, rows: int = 1) -> float:
        """One microbatch in which `rows` sequences get a token each. The worker must have been measured."""
        held = self._weights[end] - self._weights[start] + self._head(end, self.costs.head_bytes)
        read = min(held, rows * (held - self._idle[end] + self._idle[start]))
        macs = self._macs[end] - self._macs[start] + self._head(end, self.costs.head_macs)
        return _roofline_ms(worker, read, rows * macs)

    def prefill_ms(self, worker: WorkerFacts, start: int, end: int, rows: int) -> float:
        """One microbatch of that many prompt tokens, none of them an output row."""
        read = self._weights[end] - self._weights[start]
        return _roofline_ms(worker, read, rows * (self._macs[end] - self._macs[start]))

    def _head(self, end: int, value: int) -> int:
        return value if end == self.layers else 0


def _roofline_ms(worker: WorkerFacts, read_bytes: int, macs: int) -> float:
    assert worker.read_gb_s is not None and worker.int8_gmac_s is not None
    return max(read_bytes / worker.read_gb_s, macs / worker.int8_gmac_s) / 1e6

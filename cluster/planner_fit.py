"""What fits into memory: stages and KV blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from llamaclust.cluster.costs import StageCosts, Table, WorkerFacts
from llamaclust.cluster.planner_workspace import StagePlace, Workspace
from llamaclust.model.program import KV_BLOCK_TOKENS

_WANTED_CONTEXTS = 4

Cut = Sequence[tuple[WorkerFacts, int, int]]
"""Stages in order: layers [start, end) on a worker."""


@dataclass(frozen=True, slots=True)
class PlanLimits:
    """What stages are to hold besides weights."""

    context_length: int
    max_sequences: int
    workspace: Workspace
    kv_memory_bytes: int | None  # per worker, at most

    @property
    def context_blocks(self) -> int:
        """KV blocks of one whole context."""
        return -(-self.context_length // KV_BLOCK_TOKENS)


@dataclass(frozen=True, slots=True)
class Sizes:
    """Bytes of stages under limits."""

    stages: StageCosts
    limits: PlanLimits

    @property
    def wanted_contexts(self) -> tuple[int, ...]:
        """For how many whole contexts a cut should leave KV memory, best first; one is the least."""
        return tuple(dict.fromkeys((min(_WANTED_CONTEXTS, self.limits.max_sequences), 1)))

    def workspace_bytes(self, worker: WorkerFacts, end: int) -> int:
        limits = self.limits
        return limits.workspace(StagePlace(worker.threads, limits.context_length, end == self.stages.layers))

    def context_bytes(self, start: int, end: int) -> int:
        """KV memory of one whole context."""
        return self.limits.context_blocks * self.stages.kv_block_bytes(start, end)

    def parts(self, worker: WorkerFacts, start: int, end: int, contexts: int) -> Mapping[str, int]:
        """What the stage takes, with KV memory for that many whole contexts as far as the given KV memory goes."""
        kv, given = contexts * self.context_bytes(start, end), self.limits.kv_memory_bytes
        return {
            "weights": self.stages.weight_bytes(start, end),
            "KV memory": kv if given is None else min(kv, given),
            "workspace": self.workspace_bytes(worker, end),
        }

    def kv_blocks(self, cut: Cut) -> int:
        """Blocks that every stage has room for: at most what all sequences at their longest take, unless the KV memory
        is given."""
        most = self.limits.context_blocks * self.limits.max_sequences
        return min((self._stage_blocks(worker, start, end, most) for worker, start, end in cut), default=0)

    def _stage_blocks(self, worker: WorkerFacts, start: int, end: int, most: int) -> int:
        block_bytes = self.stages.kv_block_bytes(start, end)
        given = self.limits.kv_memory_bytes
        if worker.memory_bytes is None:
            return most if given is None else given // block_bytes
        left = worker.memory_bytes - sum(self.parts(worker, start, end, 0).values())
        if given is not None:
            return min(given, left) // block_bytes
        least = min(self.context_bytes(start, end), left)
        return min(most, max(least, left // 2) // block_bytes)

    def missing_kv_bytes(self, start: int, end: int) -> int:
        """What the given KV memory lacks for one whole context."""
        given = self.limits.kv_memory_bytes
        return 0 if given is None else max(0, self.context_bytes(start, end) - given)

    def missing_bytes(self, worker: WorkerFacts, start: int, end: int, contexts: int) -> int:
        """What the worker's memory lacks for the stage with KV memory for that many contexts."""
        short_of_given = self.missing_kv_bytes(start, end)
        if worker.memory_bytes is None:
            return short_of_given
        return max(short_of_given, sum(self.parts(worker, start, end, contexts).values()) - worker.memory_bytes, 0)

    def fits(self, worker: WorkerFacts, start: int, end: int, contexts: int) -> bool:
        return self.missing_bytes(worker, start, end, contexts) == 0

    def missing_table(self, worker: WorkerFacts, contexts: int) -> Table:
        """`missing_bytes` of all stages; infinite where start >= end."""
        stages, given = self.stages, self.limits.kv_memory_bytes
        context = self.limits.context_blocks * KV_BLOCK_TOKENS * stages.kv_token_bytes
        missing = np.zeros_like(context) if given is None else np.maximum(context - given, 0)
        if worker.memory_bytes is not None:
            kv = contexts * context if given is None else np.minimum(contexts * context, given)
            workspace = [self.workspace_bytes(worker, end) for end in range(stages.layers + 1)]
            missing = np.maximum(missing, stages.held_bytes + kv + workspace - worker.memory_bytes)
        return np.where(stages.stages, missing, np.inf)

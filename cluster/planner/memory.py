"""Memory of stages: weights, KV blocks, workspace; what fits, and shortfalls."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from llamaclust.cluster.planner.adjacency import Pairs
from llamaclust.cluster.planner.costs import Counts, StageCosts, Table, WorkerFacts
from llamaclust.cluster.planner.devices import Division, Held, divide
from llamaclust.cluster.planner.links import UNKNOWN, Links
from llamaclust.cluster.planner.manual import Assignment
from llamaclust.cluster.scheduler.kv_groups import StateGroup, WindowGroup, state_group, window_group
from llamaclust.core.limits import MAX_KV_BLOCKS
from llamaclust.model.program import KV_BLOCK_TOKENS


@dataclass(frozen=True, slots=True)
class StagePlace:
    """What a stage's workspace depends on, besides the model and the rows of a microbatch."""

    threads: int
    context_length: int
    is_last: bool  # it has the head
    device: str = "cpu"


Workspace = Callable[[StagePlace], int]
"""Bytes of any stage at such a place, at most. Asked often for equal places: it is to remember."""
Rounding = Callable[[str], Counts | int]
"""What weights of layers [start, end) take of a device's memory beyond their bytes: a table by start and end, or the
same for all. It is to remember likewise."""


Split = Sequence[tuple[WorkerFacts, int, int]]
"""Stages in order: layers [start, end) on a worker."""


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """Constraints and objective of a plan."""

    context_length: int
    max_sequences: int
    workspace: Workspace
    objective: str = "latency"  # latency | throughput
    manual: tuple[Assignment, ...] | None = None
    kv_memory_bytes: int | None = None  # per worker, at most; None: up to half of what weights and workspace leave
    links: Links = UNKNOWN
    partitions: Pairs = frozenset()  # pairs that cannot reach each other: not adjacent
    max_batch_tokens: int = 0  # of a microbatch
    rounding: Rounding = lambda device: 0

    @property
    def context_blocks(self) -> int:
        """KV blocks of one whole context."""
        return -(-self.context_length // KV_BLOCK_TOKENS)


@dataclass(frozen=True, slots=True)
class MemoryModel:
    """Bytes of stages under the limits of a request."""

    stages: StageCosts
    request: PlanRequest

    def workspace_bytes(self, worker: WorkerFacts, start: int, end: int) -> int:
        """What a stage takes beside weights and KV memory."""
        rounding = self.request.rounding(worker.device)
        of_weights = rounding if isinstance(rounding, int) else int(rounding[start, end])
        return self._workspace_to(worker, end) + of_weights

    def _workspace_to(self, worker: WorkerFacts, end: int) -> int:
        place = StagePlace(worker.threads, self.request.context_length, end == self.stages.layers, worker.device)
        return self.request.workspace(place)

    @property
    def window_group(self) -> WindowGroup | None:
        """Layers that have KV blocks of their own."""
        return window_group(self.stages.window, self.request.context_length, self.request.max_batch_tokens)

    def window_blocks(self, kv_blocks: int) -> int:
        """Beside so many blocks of other layers; 0 where all layers have these."""
        group, request = self.window_group, self.request
        return 0 if group is None else group.blocks_beside(kv_blocks, request.context_length, request.max_sequences)

    @property
    def state_group(self) -> StateGroup | None:
        """States of sequences."""
        stages = self.stages
        return state_group(int(stages.state_bytes[0, stages.layers]), int(stages.kv_token_bytes[0, stages.layers]))

    def state_blocks(self, kv_blocks: int) -> int:
        """Beside so many KV blocks; 0 where no layer has states."""
        group = self.state_group
        return 0 if group is None else group.blocks_beside(kv_blocks, self.request.max_sequences)

    def kv_bytes(self, start: int, end: int, kv_blocks: int) -> int:
        """KV memory of a stage with so many blocks."""
        return int(self._kv_table(kv_blocks)[start, end])

    def _kv_table(self, kv_blocks: int) -> Counts:
        """`kv_bytes` of all stages."""
        stages = self.stages
        windowed = 0 if self.window_group is None else stages.window_token_bytes
        table: Counts = ((stages.kv_token_bytes - windowed) * kv_blocks) * KV_BLOCK_TOKENS
        table = table + windowed * (self.window_blocks(kv_blocks) * KV_BLOCK_TOKENS)
        return table + stages.state_bytes * self.state_blocks(kv_blocks)

    def _blocks_in(self, start: int, end: int, kv_bytes: int, most: int) -> int:
        """How many blocks such a stage has in so much KV memory, no more than `most`."""
        if self.window_group is None and self.state_group is None:
            return min(most, kv_bytes // (int(self.stages.kv_token_bytes[start, end]) * KV_BLOCK_TOKENS))
        if self.stages.kv_token_bytes[start, end] == self.stages.window_token_bytes[start, end]:
            most = min(most, self.request.context_blocks * self.request.max_sequences)  # more of them cost nothing
        return bisect_right(range(1, most + 1), kv_bytes, key=lambda blocks: self.kv_bytes(start, end, blocks))

    def context_bytes(self, start: int, end: int, contexts: int = 1) -> int:
        """KV memory of whole contexts."""
        return self.kv_bytes(start, end, contexts * self.request.context_blocks)

    def parts(self, worker: WorkerFacts, start: int, end: int, contexts: int) -> Mapping[str, int]:
        """What the stage takes, with KV memory for that many whole contexts as far as the given KV memory goes."""
        kv, given = self.context_bytes(start, end, contexts) if contexts else 0, self.request.kv_memory_bytes
        return {
            "weights": self.stages.weight_bytes(start, end),
            "KV memory": kv if given is None else min(kv, given),
            "workspace": self.workspace_bytes(worker, start, end),
        }

    def kv_blocks(self, split: Split) -> int:
        """Blocks that every stage has room for: at most what all sequences at their longest take, unless the KV memory
        is given."""
        most = self.request.context_blocks * self.request.max_sequences
        return min((self._stage_blocks(worker, start, end, most) for worker, start, end in split), default=0)

    def _stage_blocks(self, worker: WorkerFacts, start: int, end: int, most: int) -> int:
        given = self.request.kv_memory_bytes
        if worker.memory_bytes is None:
            return most if given is None else self._blocks_in(start, end, given, MAX_KV_BLOCKS)
        left = worker.memory_bytes - sum(self.parts(worker, start, end, 0).values())
        if given is not None:
            return self._blocks_in(start, end, min(given, left), MAX_KV_BLOCKS)
        least = min(self.context_bytes(start, end), left)
        return self._blocks_in(start, end, max(least, left // 2), most)

    def shortfall_table(self, worker: WorkerFacts, contexts: int) -> Table:
        """Bytes that the worker's devices together lack for stages with KV memory for that many contexts, or the given
        KV memory for one; infinite where start >= end."""
        if worker.gpus:
            return self.over_devices(worker, contexts, lambda device: self.shortfall_table(device, contexts))
        stages, given = self.stages, self.request.kv_memory_bytes
        context = self._kv_table(self.request.context_blocks)
        missing = np.zeros_like(context) if given is None else np.maximum(context - given, 0)
        if worker.memory_bytes is not None:
            kv = self._kv_table(contexts * self.request.context_blocks)
            kv = kv if given is None else np.minimum(kv, given)
            workspace = [self._workspace_to(worker, end) for end in range(stages.layers + 1)]
            held = stages.held_bytes + self.request.rounding(worker.device)
            missing = np.maximum(missing, held + kv + workspace - worker.memory_bytes)
        return np.where(np.triu(np.ones(missing.shape, np.bool_), 1), missing, np.inf)

    def _division(self, worker: WorkerFacts, contexts: int) -> Division:
        return divide(worker, self.stages.layers, lambda device: self.shortfall_table(device, contexts))

    def over_devices(self, worker: WorkerFacts, contexts: int, table: Callable[[WorkerFacts], Table]) -> Table:
        """What `table` has of the worker; with GPUs, the sum over its devices, each for the layers that it holds."""
        return self._division(worker, contexts).sums(table) if worker.gpus else table(worker)

    def held(self, worker: WorkerFacts, start: int, end: int, contexts: int) -> tuple[Held, ...]:
        """Which of its devices hold which layers of a stage."""
        return self._division(worker, contexts).held(start, end) if worker.gpus else ((worker, start, end),)

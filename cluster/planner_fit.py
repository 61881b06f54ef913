"""What fits into memory: stages, KV blocks, and what is missing where a model does not fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil

import numpy as np

from llamaclust.cluster.costs import StageCosts, WorkerFacts, Workspace
from llamaclust.cluster.plan import MIB
from llamaclust.cluster.planner_search import Table, least_sum
from llamaclust.errors import DoesNotFitError
from llamaclust.model.program import KV_BLOCK_TOKENS

_WANTED_CONTEXTS = 4
_CONTEXT_STEP = 256


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

    def workspace_bytes(self, end: int) -> int:
        head = self.limits.workspace.head_bytes if end == self.stages.layers else 0
        return self.limits.workspace.stage_bytes + head

    def fixed_bytes(self, start: int, end: int) -> int:
        """Weights and workspace."""
        return self.stages.weight_bytes(start, end) + self.workspace_bytes(end)

    def context_bytes(self, start: int, end: int) -> int:
        """KV memory of one whole context."""
        return self.limits.context_blocks * self.stages.kv_block_bytes(start, end)

    def kv_blocks(self, cut: Sequence[tuple[WorkerFacts, int, int]]) -> int:
        """Blocks that every stage has room for. DoesNotFitError where that is less than one whole context.

        At most what all sequences at their longest take, unless the KV memory is given.
        """
        most = self.limits.context_blocks * self.limits.max_sequences
        blocks = min((self._stage_blocks(worker, start, end, most) for worker, start, end in cut), default=0)
        if blocks < self.limits.context_blocks:
            raise self._stage_does_not_fit(cut)
        return blocks

    def _stage_blocks(self, worker: WorkerFacts, start: int, end: int, most: int) -> int:
        block_bytes = self.stages.kv_block_bytes(start, end)
        given = self.limits.kv_memory_bytes
        if worker.memory_bytes is None:
            return most if given is None else given // block_bytes
        left = worker.memory_bytes - self.fixed_bytes(start, end)
        if given is not None:
            return min(given, left) // block_bytes
        least = min(self.context_bytes(start, end), left)
        return min(most, max(least, left // 2) // block_bytes)

    def missing_bytes(self, worker: WorkerFacts, start: int, end: int, contexts: int) -> int:
        """What the worker's memory lacks for the stage with KV memory for that many contexts."""
        kv = contexts * self.context_bytes(start, end)
        if self.limits.kv_memory_bytes is not None:
            short_of_given = max(0, self.context_bytes(start, end) - self.limits.kv_memory_bytes)
            kv = min(kv, self.limits.kv_memory_bytes)
        else:
            short_of_given = 0
        if worker.memory_bytes is None:
            return short_of_given
        return max(short_of_given, self.fixed_bytes(start, end) + kv - worker.memory_bytes, 0)

    def _stage_does_not_fit(self, cut: Sequence[tuple[WorkerFacts, int, int]]) -> DoesNotFitError:
        worker, start, end = max(cut, key=lambda stage: self.missing_bytes(stage[0], stage[1], stage[2], 1))
        kv, given = self.context_bytes(start, end), self.limits.kv_memory_bytes
        if given is not None and given < kv:
            has = f"kv_memory is {_mib(given)} MiB"
        else:
            has = f"it has {_mib(worker.memory_bytes or 0)} MiB"
        return DoesNotFitError(
            f"layers [{start}, {end}) do not fit on worker {worker.name!r}: they need "
            f"{_mib(self.stages.weight_bytes(start, end))} MiB of weights, {_mib(kv)} MiB of KV for "
            f"{self.limits.context_length} tokens and {_mib(self.workspace_bytes(end))} MiB of workspace, {has}: "
            f"{_mib(self.missing_bytes(worker, start, end, 1))} MiB are missing; give it fewer layers or more memory"
        )


def fits(sizes: Sizes, worker: WorkerFacts, start: int, end: int, contexts: int) -> bool:
    return sizes.missing_bytes(worker, start, end, contexts) == 0


def does_not_fit(sizes: Sizes, workers: Sequence[WorkerFacts]) -> DoesNotFitError:
    """Says what is missing at least, over all cuts in the given order, and what it would take."""
    layers = sizes.stages.layers
    missing = _least_missing(sizes, workers)
    weights, context = sizes.stages.weight_bytes(0, layers), sizes.context_bytes(0, layers)
    have = ", ".join(f"{w.name} {_mib(w.memory_bytes)}" for w in workers if w.memory_bytes is not None)
    return DoesNotFitError(
        f"the model does not fit: it needs {_mib(weights)} MiB of weights, {_mib(context)} MiB of KV for "
        f"{sizes.limits.context_length} tokens and {_mib(sizes.workspace_bytes(layers))} MiB of workspace a worker; "
        f"the workers have, in MiB: {have}; {_mib(missing)} MiB are missing. Add a worker, give them more memory"
        f"{_shorter_context(sizes, workers)}"
    )


def _least_missing(sizes: Sizes, workers: Sequence[WorkerFacts]) -> float:
    """Bytes that memory lacks in the best of all cuts."""
    by_memory = {worker.memory_bytes: worker for worker in workers}
    tables = {memory: _missing(sizes, worker) for memory, worker in by_memory.items()}
    found = least_sum([tables[worker.memory_bytes] for worker in workers], may_skip=True)
    assert found is not None
    return found[0]


def _missing(sizes: Sizes, worker: WorkerFacts) -> Table:
    layers = sizes.stages.layers
    table = np.full((layers + 1, layers + 1), np.inf)
    for start in range(layers):
        for end in range(start + 1, layers + 1):
            table[start, end] = sizes.missing_bytes(worker, start, end, 1)
    return table


def _shorter_context(sizes: Sizes, workers: Sequence[WorkerFacts]) -> str:
    """The longest context that fits, as a piece of advice."""
    low, high = 0, sizes.limits.context_length // _CONTEXT_STEP
    while low < high:
        middle = (low + high + 1) // 2
        shorter = replace(sizes, limits=replace(sizes.limits, context_length=middle * _CONTEXT_STEP))
        low, high = (middle, high) if _least_missing(shorter, workers) == 0 else (low, middle - 1)
    return f", or set context_length to {low * _CONTEXT_STEP} or less" if low else ", or take a smaller model"


def _mib(size_bytes: float) -> int:
    return ceil(size_bytes / MIB)

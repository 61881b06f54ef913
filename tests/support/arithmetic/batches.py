"""Short notation for batches, and a chain of stages that computes the logits of a token sequence in any chunks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise

import numpy as np
from numpy.typing import NDArray

from llamaclust.cluster.planner.costs import StageCosts
from llamaclust.core.limits import StageLimits
from llamaclust.kernels.backend import Backend, Batch, Float32, Stage
from llamaclust.model.kv_type import KvType
from llamaclust.model.loader import Model
from llamaclust.model.program import KV_BLOCK_TOKENS

LIMITS = StageLimits(max_batch_tokens=128, max_outputs=128, max_sequences=8, max_context_tokens=1024, kv_blocks=80)

Rows = tuple[Iterable[int], Iterable[int], Iterable[int]]
"""Tokens, positions and block table of one sequence."""


def batch_of(sequences: Sequence[Rows], *, outputs: Iterable[int] | None = None) -> Batch:
    """Builds a batch that outputs all rows, or those in `outputs`."""
    parts = [tuple(np.array(list(part), np.int32) for part in sequence) for sequence in sequences]
    tokens, positions, tables = (np.concatenate(column) for column in zip(*parts, strict=True))
    wanted = range(len(tokens)) if outputs is None else outputs
    return Batch(
        tokens=tokens,
        positions=positions,
        sequence_starts=_starts(part[0] for part in parts),
        table_starts=_starts(part[2] for part in parts),
        block_tables=tables,
        output_rows=np.array(list(wanted), np.int32),
    )


def _starts(parts: Iterable[NDArray[np.int32]]) -> NDArray[np.int32]:
    return np.cumsum([0, *(len(part) for part in parts)]).astype(np.int32)


def load_stage(
    backend: Backend, model: Model, start: int = 0, end: int | None = None, limits: StageLimits = LIMITS
) -> Stage:
    shards = limits.expert_shards
    last = model.layer_count * shards if end is None else end
    program = model.program(start, last, KvType(limits.kv_type), limits.max_context_tokens, shards)
    return backend.load(program, model.tensors_for(program), limits, lambda done_bytes: None)


def possible_cuts(model: Model, cuts: Iterable[int], expert_shards: int = 1) -> tuple[int, ...]:
    """Returns the cuts that separate neither layers with shared KV nor parts of layers without experts."""
    possible = StageCosts.of(model.costs(KvType.F16, expert_shards)).possible
    return tuple(cut for cut in cuts if possible[cut, cut])


class Chain:
    """A model in stages that begin at layers `cuts`, or at parts of layers if the limits have several expert shards."""

    def __init__(self, backend: Backend, model: Model, cuts: Sequence[int] = (), limits: StageLimits = LIMITS) -> None:
        bounds = [0, *cuts, model.layer_count * limits.expert_shards]
        self.stages = [load_stage(backend, model, start, end, limits) for start, end in pairwise(bounds)]

    def run(self, batch: Batch) -> Float32:
        hidden: Float32 | None = None
        for stage in self.stages:
            hidden = stage.run(batch, hidden)
        assert hidden is not None
        return hidden.copy()

    def logits(
        self, tokens: Sequence[int], chunk: int | Sequence[int] | None = None, table: Sequence[int] | None = None
    ) -> Float32:
        """Returns logits at every position, in batches of `chunk` tokens or of the sizes in `chunk`; the default block
        table is descending."""
        blocks = table or range(-(-len(tokens) // KV_BLOCK_TOKENS), -1, -1)
        borders = _borders(len(tokens), chunk or len(tokens))
        return np.concatenate([self.run(batch_of([(tokens[a:b], range(a, b), blocks)])) for a, b in pairwise(borders)])

    def close(self) -> None:
        for stage in self.stages:
            stage.close()


def _borders(count: int, chunk: int | Sequence[int]) -> list[int]:
    """Returns the bounds of batches of `chunk` tokens, or of the sizes in `chunk`."""
    if isinstance(chunk, int):
        return [*range(0, count, chunk), count]
    assert sum(chunk) == count
    return [0, *accumulate(chunk)]

"""The recurrent states of sequences: their memory in blocks, and the steps that update states row by row."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from llamaclust.core.limits import StageLimits
from llamaclust.kernels.backend import Batch, Float32
from llamaclust.kernels.reference.kv import Float64
from llamaclust.model.program import KV_BLOCK_TOKENS, Convolution, SequenceState


class StateMemory:
    def __init__(self, state: SequenceState, limits: StageLimits) -> None:
        self._has_blocks = limits.state_blocks > 0  # True if states have their own blocks; see `Batch.states`.
        blocks = limits.state_blocks or limits.kv_blocks
        self._values: Float32 = np.full((blocks, state.floats), np.nan, np.float32)

    @property
    def n_bytes(self) -> int:
        return self._values.nbytes

    def sequences(self, batch: Batch) -> Iterator[SequenceRows]:
        for sequence in range(len(batch.sequence_starts) - 1):
            rows = range(*batch.sequence_starts[sequence : sequence + 2].tolist())
            before, blocks = (_own_blocks if self._has_blocks else _kv_blocks)(batch, sequence, rows)
            yield SequenceRows(rows, self._values, before if batch.positions[rows.start] else None, blocks)


def _own_blocks(batch: Batch, sequence: int, rows: range) -> tuple[int, dict[int, int]]:
    states = batch.states
    assert states is not None, "a batch without states"
    places = slice(*states.starts[sequence : sequence + 2].tolist())
    written = dict(zip(states.rows[places].tolist(), states.blocks[places].tolist(), strict=True))
    assert rows.stop - 1 in written, "the state behind the last row is lost"
    return int(states.before[sequence]), written


def _kv_blocks(batch: Batch, sequence: int, rows: range) -> tuple[int, dict[int, int]]:
    table = batch.block_tables[batch.table_starts[sequence] : batch.table_starts[sequence + 1]]
    first = int(batch.positions[rows.start])
    written = {row: int(table[(first + row - rows.start) // KV_BLOCK_TOKENS]) for row in rows}
    return int(table[max(0, first - 1) // KV_BLOCK_TOKENS]), written


@dataclass(frozen=True, slots=True)
class SequenceRows:
    rows: range
    values: Float32
    read: int | None  # Block of the state that the first row reads; None if the sequence begins there.
    written: Mapping[int, int]  # Block of the state after a row, by row.

    def before(self) -> Float32:
        if self.read is None:
            return np.zeros_like(self.values[0])
        assert self.read >= 0, "a state that is not there is read"
        state: Float32 = self.values[self.read].copy()
        return state

    def store(self, row: int, state: Float32) -> None:
        if (block := self.written.get(row)) is not None:
            assert block >= 0, "a state is written nowhere"
            self.values[block] = state.reshape(-1)


def convolve(
    step: Convolution, x: Float32, weights: Mapping[str, Float32], sequences: Iterator[SequenceRows]
) -> Float64:
    weight = weights[step.weight].astype(np.float64)
    out = np.zeros(x.shape) if step.bias is None else np.tile(weights[step.bias].astype(np.float64), (len(x), 1))
    for sequence in sequences:
        history = sequence.before().reshape(step.taps - 1, step.x.width)
        for row in sequence.rows:
            seen = np.concatenate([history, x[row : row + 1]])
            for tap, inputs in enumerate(seen):
                out[row] += inputs * weight[:, tap]
            history = seen[1:]
            sequence.store(row, history)
    return out

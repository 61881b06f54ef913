"""States of sequences: their memory in blocks, and the steps that update them, row after row."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from llamaclust.kernels.backend import Batch, Float32, Int32
from llamaclust.kernels.reference.kv import Float64
from llamaclust.model.program import KV_BLOCK_TOKENS, Convolution, SequenceState


class StateMemory:
    """The state of a layer, [blocks, floats]. What was never stored is NaN."""

    def __init__(self, state: SequenceState, blocks: int, *, windowed: bool = False) -> None:
        self.windowed = windowed  # its blocks are those of `Batch.window_tables`
        self._values: Float32 = np.full((blocks, state.floats), np.nan, np.float32)

    @property
    def n_bytes(self) -> int:
        return self._values.nbytes

    def sequences(self, batch: Batch) -> Iterator[SequenceRows]:
        tables = batch.window_tables if self.windowed else batch.block_tables
        assert tables is not None
        for sequence in range(len(batch.sequence_starts) - 1):
            start, end = batch.sequence_starts[sequence : sequence + 2]
            table = tables[batch.table_starts[sequence] : batch.table_starts[sequence + 1]]
            yield SequenceRows(range(start, end), int(batch.positions[start]), self._values, table)


@dataclass(frozen=True, slots=True)
class SequenceRows:
    """Rows of one sequence, the first one at `position`, and its states [blocks, floats] by block table."""

    rows: range
    position: int
    values: Float32
    table: Int32

    def before(self) -> Float32:
        """The state that the first row reads."""
        return np.zeros_like(self.values[0]) if self.position == 0 else self.values[self._block(-1)].copy()

    def store(self, row: int, state: Float32) -> None:
        """What a row leaves."""
        self.values[self._block(row - self.rows.start)] = state.reshape(-1)

    def _block(self, row: int) -> int:
        block = int(self.table[(self.position + row) // KV_BLOCK_TOKENS])
        assert block >= 0, "a state that is not there is read or written"
        return block


def convolve(
    step: Convolution, x: Float32, weights: Mapping[str, Float32], sequences: Iterator[SequenceRows]
) -> Float64:
    """Sums over taps in their order."""
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

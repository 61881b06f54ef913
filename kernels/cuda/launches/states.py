"""Launches of steps with a state of each sequence. Pure: knows addresses only."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llamaclust.kernels.cuda.launches.inputs import Inputs, RowCount
from llamaclust.kernels.cuda.launches.matmul import Weights
from llamaclust.kernels.cuda.runtime.device import Launch, Scalar
from llamaclust.model.program import Convolution, Decay, DeltaRule

_BLOCK = 256
_DELTA_CHANNELS = 32
"""Of a block of delta_rule."""


@dataclass(frozen=True, slots=True)
class StateLaunches:
    """Launches for microbatches of up to `sequences` sequences; `states` of a layer, [blocks, floats]."""

    inputs: Inputs
    sequences: int
    states: np.uint64

    @property
    def _places(self) -> tuple[Scalar, ...]:
        at = self.inputs
        return (
            at.rows,
            at.sequence_starts,
            at.state_before,
            at.state_starts,
            at.state_rows,
            at.state_blocks,
            self.states,
        )

    def convolve(
        self, step: Convolution, x: np.uint64, weights: Weights, bias: np.uint64, out: np.uint64, rows: RowCount
    ) -> tuple[Launch, ...]:
        """The second launch keeps what later rows read; it may be written where the first one reads."""
        width, figures = step.x.width, (np.int32(step.taps), np.int32(step.x.width))
        blocks = -(-width // _BLOCK)
        kernel = f"states.convolve_{weights.quant_type.name}"
        args = (x, weights.address, np.int32(weights.tile_bytes), bias, *figures, *self._places, out)
        return (
            Launch(kernel, (blocks, rows.bucket, 1), (_BLOCK, 1, 1), args),
            Launch("states.keep_rows", (blocks, self.sequences, 1), (_BLOCK, 1, 1), (x, *figures, *self._places)),
        )

    def delta_rule(self, step: DeltaRule, inputs: tuple[np.uint64, ...], out: np.uint64) -> Launch:
        """`inputs`: q, k, v, decay and beta."""
        heads, keys, values = step.shape
        figures = map(np.int32, (heads, step.key_heads, step.tiled, keys, values, step.decay.width))
        grid = heads * -(-values // _DELTA_CHANNELS), self.sequences, 1
        args: tuple[Scalar, ...] = (*inputs, *figures, *self._places, out)
        return Launch("states.delta_rule", grid, (_DELTA_CHANNELS, 1, 1), args, 4 * keys * _DELTA_CHANNELS)


def decay(step: Decay, x: np.uint64, vectors: tuple[np.uint64, np.uint64], out: np.uint64, rows: RowCount) -> Launch:
    """`vectors`: weight and bias."""
    args = (x, *vectors, np.int32(step.out.width), np.int32(step.heads), rows.address, out)
    return Launch("states.decay", (-(-step.out.width // _BLOCK), rows.bucket, 1), (_BLOCK, 1, 1), args)

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llamaclust.kernels.cuda.launches.inputs import Inputs, RowCount
from llamaclust.kernels.cuda.launches.matmul import Weights
from llamaclust.kernels.cuda.runtime.device import PLAIN_SHARED_BYTES, Launch, Scalar
from llamaclust.model.program import Convolution, Decay, DeltaRule, Scan

_BLOCK = 256
_DELTA_CHANNELS = 32
_SCAN_CHANNELS = (32, 16, 8, 4, 2)
"""The channel counts that a scan's thread block may have. The largest count whose states fit shared memory is used."""


def _scan_bytes(step: Scan, channels: int) -> int:
    return 4 * step.state_size * channels


@dataclass(frozen=True, slots=True)
class StateLaunches:
    """Launches for microbatches of up to `sequences` sequences. `states` is a layer's memory [blocks, floats]."""

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
        width, figures = step.x.width, (np.int32(step.taps), np.int32(step.x.width))
        blocks = -(-width // _BLOCK)
        kernel = f"states.convolve_{weights.quant_type.name}"
        args = (x, weights.address, np.int32(weights.tile_bytes), bias, *figures, *self._places, out)
        return (
            Launch(kernel, (blocks, rows.bucket, 1), (_BLOCK, 1, 1), args),
            Launch("states.keep_rows", (blocks, self.sequences, 1), (_BLOCK, 1, 1), (x, *figures, *self._places)),
        )

    def delta_rule(self, step: DeltaRule, inputs: tuple[np.uint64, ...], out: np.uint64) -> Launch:
        heads, keys, values = step.shape
        figures = map(np.int32, (heads, step.key_heads, step.tiled, keys, values, step.decay.width))
        grid = heads * -(-values // _DELTA_CHANNELS), self.sequences, 1
        args: tuple[Scalar, ...] = (*inputs, *figures, *self._places, out)
        return Launch("states.delta_rule", grid, (_DELTA_CHANNELS, 1, 1), args, 4 * keys * _DELTA_CHANNELS)

    def scan(
        self, step: Scan, inputs: tuple[np.uint64, np.uint64], weights: tuple[np.uint64, ...], out: np.uint64
    ) -> Launch:
        """Returns the launch of a scan. `inputs` are x and dt. `weights` are bias, decay and skip, float32 [heads]."""
        channels = step.out.width // step.heads
        together = next(n for n in _SCAN_CHANNELS if _scan_bytes(step, n) <= PLAIN_SHARED_BYTES)
        figures = map(np.int32, (step.heads, channels, step.groups, step.state_size))
        grid = step.heads * -(-channels // together), self.sequences, 1
        args: tuple[Scalar, ...] = (*inputs, *weights, *figures, *self._places, out)
        return Launch("states.scan", grid, (together, 1, 1), args, _scan_bytes(step, together))


def decay(step: Decay, x: np.uint64, vectors: tuple[np.uint64, np.uint64], out: np.uint64, rows: RowCount) -> Launch:
    args = (x, *vectors, np.int32(step.out.width), np.int32(step.heads), rows.address, out)
    return Launch("states.decay", (-(-step.out.width // _BLOCK), rows.bucket, 1), (_BLOCK, 1, 1), args)

"""The integers of a microbatch, all in one GPU buffer. Without images, one copy to the GPU is enough."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from operator import mul

import numpy as np
from numpy.typing import NDArray

from llamaclust.core.limits import StageLimits
from llamaclust.kernels.backend import Batch
from llamaclust.kernels.cuda.executor.batch_checks import check_batch, check_images
from llamaclust.kernels.cuda.executor.shapes import ImageReads, Shape
from llamaclust.kernels.cuda.executor.state_places import state_places
from llamaclust.kernels.cuda.launches.inputs import Inputs
from llamaclust.kernels.cuda.runtime.memory import aligned
from llamaclust.model.program import KV_BLOCK_TOKENS, FewerRows, Program

_HEADER = 8  # int32 counts: rows, sequences, outputs, and rows after each step that merges rows.
_INT = 4
_COUNTS = 3
_SEEN = 4


class InputBuffer:
    """The layout of the input buffer. The inputs of images are at its end, and are copied only if there are images."""

    def __init__(self, program: Program, limits: StageLimits) -> None:
        self._limits, self._has_states = limits, program.has_states
        self._reads, self._given = ImageReads.of(program), (program.given_levels, program.given_width)
        self._merged = tuple(accumulate((step.factor for step in program.steps if isinstance(step, FewerRows)), mul))
        self._window = program.window if limits.gives_up(program.window) else None
        tables = limits.max_sequences * -(-limits.max_context_tokens // KV_BLOCK_TOKENS)
        starts = limits.max_sequences + 1
        rows = limits.max_batch_tokens
        states = (starts, starts, rows, rows) if self._has_states else (0, 0, 0, 0)
        window_tables = tables if self._window else 0
        images = self._reads.sections * rows, _SEEN * rows
        counts = (_HEADER, rows, rows, starts, starts, limits.max_outputs, *states, tables, window_tables, *images)
        self._offsets = (0, *accumulate(aligned(_INT * count) for count in counts))

    @property
    def n_bytes(self) -> int:
        return self._offsets[-1]

    def addresses(self, base: int) -> Inputs:
        header, *parts, rope_positions, seen = (np.uint64(base + offset) for offset in self._offsets[:-1])
        if not self._window:
            parts[-1] = parts[-2]
        merged = tuple(header + np.uint64((_COUNTS + at) * _INT) for at in range(len(self._merged)))
        arrays = *parts[:5], *parts[9:], *parts[5:9], rope_positions, seen
        return Inputs(header, header + np.uint64(2 * _INT), *arrays, merged=merged)

    def fill(self, pinned: NDArray[np.uint8], batch: Batch) -> int:
        """Writes a microbatch's integers to `pinned`. Returns the number of bytes to copy. Raises ValueError."""
        check_batch(batch, self._limits, self._window)
        check_images(batch, self._limits, self._reads.sections, self._given, self._merged[-1:])
        if batch.groups is not None and not self._reads.groups:
            raise ValueError("batch: rows are in groups, but GPUs support no groups in models with latent attention")
        numbers = pinned.view(np.int32)
        merged = (batch.rows // together for together in self._merged)
        header = (batch.rows, len(batch.sequence_starts) - 1, len(batch.output_rows), *merged)
        tables = batch.block_tables, batch.window_tables if self._window else None
        starts = batch.sequence_starts, batch.table_starts
        parts: Sequence[Sequence[int] | NDArray[np.int32] | None] = (
            header, batch.tokens, batch.positions, *starts, batch.output_rows, *self._states(batch), *tables,
        )  # fmt: skip
        end = 0
        for offset, part in zip(self._offsets, parts, strict=False):
            if part is not None and len(part):
                at = offset // _INT
                numbers[at : at + len(part)] = part
                end = offset + _INT * len(part)
        return end

    def fill_images(self, pinned: NDArray[np.uint8], batch: Batch, shape: Shape) -> slice:
        numbers, (*_, rope_at, seen_at, end) = pinned.view(np.int32), self._offsets
        if shape.placed and batch.rope_positions is not None:
            rows = self._limits.max_batch_tokens
            for section, positions in enumerate(batch.rope_positions[: self._reads.sections]):
                at = rope_at // _INT + section * rows
                numbers[at : at + batch.rows] = positions
        if shape.grouped:
            seen = numbers[seen_at // _INT : seen_at // _INT + _SEEN * batch.rows].reshape(-1, _SEEN)
            seen[:, :2] = batch.groups if batch.groups is not None else batch.positions[:, None] + np.arange(2)
            counts = np.diff(batch.sequence_starts)
            seen[:, 2] = (batch.positions[batch.sequence_starts[1:] - 1] + 1).repeat(counts)
            seen[:, 3] = 0
        return slice(rope_at if shape.placed else seen_at, end if shape.grouped else seen_at)

    def _states(self, batch: Batch) -> tuple[Sequence[int], ...]:
        if not self._has_states:
            return (), (), (), ()
        places = state_places(batch, self._limits)
        return places.before, places.starts, places.rows, places.blocks

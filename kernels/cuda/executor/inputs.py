"""The integers of a microbatch on the device: one buffer at a fixed address, which one copy fills."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from llamaclust.core.limits import StageLimits
from llamaclust.kernels.backend import Batch
from llamaclust.kernels.cuda.executor.batch_checks import check_batch
from llamaclust.kernels.cuda.executor.state_places import state_places
from llamaclust.kernels.cuda.launches.inputs import Inputs
from llamaclust.kernels.cuda.runtime.memory import aligned
from llamaclust.model.program import KV_BLOCK_TOKENS, Program

_HEADER = 8  # rows, sequences, outputs, zeros
_INT = 4


class InputBuffer:
    """The parts of the input buffer. Tables come last, so that a copy can end where a microbatch's tables end."""

    def __init__(self, program: Program, limits: StageLimits) -> None:
        self._limits, self._has_states = limits, program.has_states
        self._window = program.window if limits.gives_up(program.window) else None
        tables = limits.max_sequences * -(-limits.max_context_tokens // KV_BLOCK_TOKENS)
        starts = limits.max_sequences + 1
        rows = limits.max_batch_tokens
        states = (starts, starts, rows, rows) if self._has_states else (0, 0, 0, 0)
        window_tables = tables if self._window else 0
        counts = (_HEADER, rows, rows, starts, starts, limits.max_outputs, *states, tables, window_tables)
        self._offsets = (0, *accumulate(aligned(_INT * count) for count in counts))

    @property
    def n_bytes(self) -> int:
        return self._offsets[-1]

    def addresses(self, base: int) -> Inputs:
        header, *parts = (np.uint64(base + offset) for offset in self._offsets[:-1])
        if not self._window:
            parts[-1] = parts[-2]
        return Inputs(header, header + np.uint64(2 * _INT), *parts[:5], *parts[9:], *parts[5:9])

    def fill(self, pinned: NDArray[np.uint8], batch: Batch) -> int:
        """Writes a microbatch's integers. Returns the bytes to copy. Raises ValueError if limits are exceeded."""
        check_batch(batch, self._limits, self._window)
        numbers = pinned.view(np.int32)
        header = (batch.rows, len(batch.sequence_starts) - 1, len(batch.output_rows))
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

    def _states(self, batch: Batch) -> tuple[Sequence[int], ...]:
        if not self._has_states:
            return (), (), (), ()
        places = state_places(batch, self._limits)
        return places.before, places.starts, places.rows, places.blocks

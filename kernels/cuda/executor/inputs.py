"""What a microbatch brings to the device: its numbers in one buffer, at fixed addresses, by one copy."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from llamaclust.core.limits import StageLimits
from llamaclust.kernels.backend import Batch
from llamaclust.kernels.cuda.executor.state_places import state_places
from llamaclust.kernels.cuda.launches.inputs import Inputs
from llamaclust.kernels.cuda.runtime.memory import aligned
from llamaclust.model.program import KV_BLOCK_TOKENS, Program

_HEADER = 8  # rows, sequences, outputs, zeros
_INT = 4


class InputBuffer:
    """The parts of that buffer, tables last: of it, only what a microbatch has is copied."""

    def __init__(self, program: Program, limits: StageLimits) -> None:
        self._limits = limits
        self._window, self._has_states = limits.gives_up(program.window), program.has_states
        tables = limits.max_sequences * -(-limits.max_context_tokens // KV_BLOCK_TOKENS)
        starts = limits.max_sequences + 1
        rows = limits.max_batch_tokens
        states = (starts, starts, rows, rows) if self._has_states else (0, 0, 0, 0)
        counts = (_HEADER, rows, rows, starts, starts, limits.max_outputs, *states, tables, tables * self._window)
        self._offsets = (0, *accumulate(aligned(_INT * count) for count in counts))

    @property
    def n_bytes(self) -> int:
        return self._offsets[-1]

    def addresses(self, base: int) -> Inputs:
        """Where they are in a buffer that begins there."""
        header, *parts = (np.uint64(base + offset) for offset in self._offsets[:-1])
        if not self._window:
            parts[-1] = parts[-2]
        return Inputs(header, header + np.uint64(2 * _INT), *parts[:5], *parts[9:], *parts[5:9])

    def fill(self, pinned: NDArray[np.uint8], batch: Batch) -> int:
        """Writes a microbatch's numbers; returns how many bytes of `pinned` are to be copied. ValueError where it
        exceeds the limits."""
        self._check(batch)
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

    def _check(self, batch: Batch) -> None:
        limits, sequences = self._limits, len(batch.sequence_starts) - 1
        for what, value, most in (
            ("rows", batch.rows, limits.max_batch_tokens),
            ("sequences", sequences, limits.max_sequences),
            ("outputs", len(batch.output_rows), limits.max_outputs),
            ("position", int(batch.positions.max()) + 1, limits.max_context_tokens),
            ("KV block", int(batch.block_tables.max()) + 1, limits.kv_blocks),
        ):
            if value > most:
                raise ValueError(f"batch: {what} {value} against {most}")
        if not self._window:
            return
        entries = 0 if batch.window_tables is None else len(batch.window_tables)
        if batch.window_tables is None or entries != len(batch.block_tables):
            raise ValueError(f"batch: window_tables {entries} against block_tables {len(batch.block_tables)}")
        if int(batch.window_tables.max()) >= limits.window_blocks:
            raise ValueError(f"batch: window block {batch.window_tables.max()} against {limits.window_blocks}")

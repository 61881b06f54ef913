from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from llamaclust.kernels.cuda.runtime.device import NULL


@dataclass(frozen=True, slots=True)
class Inputs:
    """The addresses of int32 arrays, which have the same meaning as in `Batch`."""

    rows: np.uint64  # Address of the number of rows. The numbers of sequences and outputs follow it.
    outputs: np.uint64  # Address of the number of outputs.
    tokens: np.uint64
    positions: np.uint64
    sequence_starts: np.uint64
    table_starts: np.uint64
    output_rows: np.uint64
    block_tables: np.uint64
    window_tables: np.uint64  # Equal to `block_tables` if no layer releases KV blocks.
    state_before: np.uint64 = NULL  # The four state arrays are as in `StatePlaces`, or 0 without states.
    state_starts: np.uint64 = NULL
    state_rows: np.uint64 = NULL
    state_blocks: np.uint64 = NULL
    rope_positions: np.uint64 = NULL  # [sections, maximum rows of a microbatch]
    seen: np.uint64 = NULL  # [rows, 4]: start and end of the row's group, end of its sequence, 0.
    merged: tuple[np.uint64, ...] = field(
        default=(), kw_only=True
    )  # Addresses of the number of rows after each step that merges rows.


@dataclass(frozen=True, slots=True)
class RowCount:
    """A grid of `bucket` rows. Kernels compute only the first `multiple` * n rows. n is the int32 at `address`."""

    bucket: int
    address: np.uint64
    multiple: int = 1

    def times(self, multiple: int) -> RowCount:
        return RowCount(self.bucket * multiple, self.address, multiple)

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from llamaclust.kernels.cuda.runtime.device import NULL


@dataclass(frozen=True, slots=True)
class Inputs:
    """The addresses of int32 arrays. The arrays have the same meaning as in `Batch`."""

    rows: np.uint64  # how many; the header, which goes on with sequences and outputs
    outputs: np.uint64  # how many
    tokens: np.uint64
    positions: np.uint64
    sequence_starts: np.uint64
    table_starts: np.uint64
    output_rows: np.uint64
    block_tables: np.uint64
    window_tables: np.uint64  # `block_tables` where no layer gives up its blocks
    state_before: np.uint64 = NULL  # these as in `StatePlaces`, where a layer has states
    state_starts: np.uint64 = NULL
    state_rows: np.uint64 = NULL
    state_blocks: np.uint64 = NULL
    rope_positions: np.uint64 = NULL  # a section has room for the most rows of a microbatch
    seen: np.uint64 = NULL  # of each row its group's start and end, its sequence's end, 0
    merged: tuple[np.uint64, ...] = field(
        default=(), kw_only=True
    )  # how many rows there are after each step that merges rows


@dataclass(frozen=True, slots=True)
class RowCount:
    """A grid of `bucket` rows. The first `multiple` * n rows are computed, where n is the int32 at `address`."""

    bucket: int
    address: np.uint64
    multiple: int = 1

    def times(self, multiple: int) -> RowCount:
        return RowCount(self.bucket * multiple, self.address, multiple)

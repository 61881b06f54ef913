"""What a microbatch needs of a stage, checked before it runs, by the rules of the CPU's executor (batch_checks.cpp):
kernels must not reach memory that is not its own. Tokens are checked where microbatches are decoded."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from llamaclust.core.limits import StageLimits
from llamaclust.kernels.backend import Batch
from llamaclust.model.program import KV_BLOCK_TOKENS


def check_batch(batch: Batch, limits: StageLimits, window: int | None) -> None:
    """`window`: the largest one of layers that give up KV blocks behind it. ValueError where it exceeds the limits."""
    for what, value, most in (
        ("rows", batch.rows, limits.max_batch_tokens),
        ("sequences", len(batch.sequence_starts) - 1, limits.max_sequences),
        ("outputs", len(batch.output_rows), limits.max_outputs),
    ):
        if value > most:
            raise ValueError(f"batch: {what} {value} against {most}")
    _check_starts("sequence_starts", batch.sequence_starts, batch.rows, 1)
    _check_starts("table_starts", batch.table_starts, len(batch.block_tables), 0)
    if len(batch.table_starts) != len(batch.sequence_starts):
        raise ValueError(f"batch: table_starts {len(batch.table_starts)} against {len(batch.sequence_starts)}")
    _check_range("position", batch.positions, limits.max_context_tokens)
    _check_range("KV block", batch.block_tables, limits.kv_blocks)
    _check_range("output row", batch.output_rows, batch.rows)
    if (wrong := np.flatnonzero(np.diff(batch.output_rows) < 1)).size:
        row, before = batch.output_rows[wrong[0] + 1], batch.output_rows[wrong[0]]
        raise ValueError(f"batch: output row {row} against [{before + 1}, {batch.rows})")
    _check_positions(batch)
    if window is not None:
        _check_windows(batch, limits.window_blocks, window)


def _check_starts(what: str, starts: NDArray[np.int32], end: int, least: int) -> None:
    """From 0, each at least so far from the one before, to `end`."""
    if not len(starts) or starts[0] != 0:
        raise ValueError(f"batch: {what} {starts[0] if len(starts) else -1} against 0")
    if (wrong := np.flatnonzero(np.diff(starts) < least)).size:
        raise ValueError(f"batch: {what} {starts[wrong[0] + 1]} against {starts[wrong[0]]}")
    if starts[-1] != end:
        raise ValueError(f"batch: {what} {starts[-1]} against {end}")


def _check_positions(batch: Batch) -> None:
    """Each sequence's positions follow each other, and its table has a block for each."""
    starts, table_starts = batch.sequence_starts, batch.table_starts
    firsts, counts = batch.positions[starts[:-1]], np.diff(starts)
    steps = np.arange(batch.rows) - np.repeat(starts[:-1], counts)
    wanted = np.repeat(firsts, counts) + steps
    if (wrong := np.flatnonzero(batch.positions != wanted)).size:
        raise ValueError(f"batch: position {batch.positions[wrong[0]]} against {wanted[wrong[0]]}")
    ends, room = firsts + counts, np.diff(table_starts) * KV_BLOCK_TOKENS
    if (wrong := np.flatnonzero(ends > room)).size:
        raise ValueError(f"batch: positions of a block table {ends[wrong[0]]} against {room[wrong[0]]}")


def _check_windows(batch: Batch, blocks: int, window: int) -> None:
    """Blocks that rows of a windowed layer read or write must be there, others may be."""
    tables, entries = batch.window_tables, len(batch.block_tables)
    if tables is None or len(tables) != entries:
        raise ValueError(f"batch: window_tables {0 if tables is None else len(tables)} against block_tables {entries}")
    for (begin, end), first_block in zip(pairwise(batch.sequence_starts.tolist()), batch.table_starts, strict=False):
        first, last = int(batch.positions[begin]), int(batch.positions[end - 1])
        reached = slice(max(0, first - window + 1) // KV_BLOCK_TOKENS, last // KV_BLOCK_TOKENS + 1)
        _check_range("window block", tables[first_block:][reached], blocks)


def _check_range(what: str, values: NDArray[np.int32], end: int) -> None:
    if len(values) and not 0 <= (least := int(values.min())) <= (greatest := int(values.max())) < end:
        raise ValueError(f"batch: {what} {least if least < 0 else greatest} against [0, {end})")

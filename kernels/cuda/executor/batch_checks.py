"""Checks a microbatch against a stage's limits, by the same rules as batch_checks.cpp."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from llamaclust.core.limits import StageLimits
from llamaclust.kernels.backend import Batch, GivenRows
from llamaclust.model.program import KV_BLOCK_TOKENS


def check_batch(batch: Batch, limits: StageLimits, window: int | None) -> None:
    """Raises ValueError if the batch exceeds `limits`. If `window` is set, layers free KV blocks outside it."""
    starts, table_starts = batch.sequence_starts.tolist(), batch.table_starts.tolist()
    outputs, rows, blocks = batch.output_rows.tolist(), batch.rows, len(batch.block_tables)
    check_range("number of rows", rows, 1, limits.max_batch_tokens + 1)
    _check_starts("sequence_starts", starts, rows, 1)
    check_range("number of sequences", len(starts) - 1, 1, limits.max_sequences + 1)
    check_range("number of outputs", len(outputs), 0, limits.max_outputs + 1)
    _check_starts("table_starts", table_starts, blocks, 0)
    if len(table_starts) != len(starts):
        raise ValueError(f"batch: number of table_starts is {len(table_starts)}, expected {len(starts)}")
    if len(batch.tokens) != rows:
        raise ValueError(f"batch: number of tokens is {len(batch.tokens)}, expected {rows}")
    least = 0
    for row in outputs:
        check_range("output row", row, least, rows)
        least = row + 1
    if blocks:
        _check_blocks("KV block", batch.block_tables, limits.kv_blocks)
    if window is not None and (batch.window_tables is None or len(batch.window_tables) != blocks):
        entries = 0 if batch.window_tables is None else len(batch.window_tables)
        raise ValueError(f"batch: number of window_tables is {entries}, expected {blocks}, as many as block_tables")
    positions = batch.positions.tolist()
    for (begin, end), (first_block, end_block) in zip(pairwise(starts), pairwise(table_starts), strict=True):
        first, last = positions[begin], positions[begin] + end - begin - 1
        _check_positions(positions[begin:end], limits.max_context_tokens, (end_block - first_block) * KV_BLOCK_TOKENS)
        if window is not None and batch.window_tables is not None:
            reached = slice(max(0, first - window + 1) // KV_BLOCK_TOKENS, last // KV_BLOCK_TOKENS + 1)
            _check_blocks("window block", batch.window_tables[first_block:end_block][reached], limits.window_blocks)


def check_images(
    batch: Batch, limits: StageLimits, sections: int, given: tuple[int, int], merged: Sequence[int]
) -> None:
    """Checks the inputs of a batch with images. `sections` is the number of RoPE positions per row. `given` is
    (levels, width) of the values in `GivenRows`. `merged` has the numbers of rows that the program merges into one."""
    for together in merged:
        for start in batch.sequence_starts.tolist():
            if start % together:
                raise ValueError(f"batch: number of rows before a sequence is {start}, not a multiple of {together}")
    if batch.groups is not None:
        _check_groups(batch, batch.groups)
    if sections and batch.rope_positions is not None:
        _check_rope_positions(batch.rope_positions, (sections, batch.rows), limits.max_context_tokens)
    levels, width = given
    if levels and batch.given is not None:
        _check_given(batch.given, batch.rows, levels * width)


def _check_groups(batch: Batch, groups: NDArray[np.int32]) -> None:
    if groups.shape != (batch.rows, 2):
        raise ValueError(f"batch: the shape of groups is {list(groups.shape)}, expected {[batch.rows, 2]}")
    starts, positions = batch.sequence_starts.tolist(), batch.positions.tolist()
    for begin, end in pairwise(starts):
        group_start, group_end = 0, positions[begin]
        for position, (first, last) in zip(positions[begin:end], groups[begin:end].tolist(), strict=True):
            if position == group_end:
                group_start, group_end = position, max(last, position + 1)
            if (first, last) != (group_start, group_end):
                expected = f"expected [{group_start}, {group_end})"
                raise ValueError(f"batch: group of position {position} is [{first}, {last}), {expected}")
        if group_end != positions[end - 1] + 1:
            raise ValueError(f"batch: end of a group is {group_end}, expected {positions[end - 1] + 1}")


def _check_rope_positions(positions: NDArray[np.int32], least: tuple[int, int], context_tokens: int) -> None:
    if positions.ndim != 2 or positions.shape[0] < least[0] or positions.shape[1] != least[1]:
        raise ValueError(f"batch: the shape of rope positions is {list(positions.shape)}, expected {list(least)}")
    for position in (int(positions.min()), int(positions.max())):
        check_range("rope position", position, 0, context_tokens)


def _check_given(given: GivenRows, rows: int, least_width: int) -> None:
    if given.values.ndim != 2 or len(given.values) != len(given.rows) or given.values.shape[1] < least_width:
        raise ValueError(
            f"batch: the shape of given rows is {list(given.values.shape)}, expected {[len(given.rows), least_width]}"
        )
    least = 0
    for row in given.rows.tolist():
        check_range("given row", row, least, rows)
        least = row + 1


def _check_starts(what: str, starts: Sequence[int], end: int, least: int) -> None:
    if not starts or starts[0] != 0:
        raise ValueError(f"batch: {what} is {starts[0] if starts else -1}, expected 0")
    for before, start in pairwise(starts):
        if start - before < least:
            raise ValueError(f"batch: {what} is {start}, expected {before + least} or more")
    if starts[-1] != end:
        raise ValueError(f"batch: {what} is {starts[-1]}, expected {end}")


def _check_positions(positions: Sequence[int], context_tokens: int, room: int) -> None:
    end = positions[0] + len(positions)
    check_range("position", positions[0], 0, context_tokens - len(positions) + 1)
    for wanted, position in zip(range(positions[0], end), positions, strict=True):
        if position != wanted:
            raise ValueError(f"batch: position is {position}, expected {wanted}")
    if end > room:
        raise ValueError(f"batch: number of positions is {end}, but the block table has room for {room}")


def _check_blocks(what: str, blocks: NDArray[np.int32], end: int) -> None:
    for block in (int(blocks.min()), int(blocks.max())):
        check_range(what, block, 0, end)


def check_range(what: str, value: int, begin: int, end: int) -> None:
    if not begin <= value < end:
        raise ValueError(f"batch: {what} is {value}, outside [{begin}, {end})")

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from llamaclust.core.limits import StageLimits
from llamaclust.kernels.backend import Batch
from llamaclust.kernels.cuda.executor.batch_checks import check_range
from llamaclust.model.program import KV_BLOCK_TOKENS


@dataclass(frozen=True, slots=True)
class StatePlaces:
    """The same blocks as in `BatchStates`, but before[s] is -1 if sequence s starts from zeros."""

    before: list[int]
    starts: list[int]
    rows: list[int]
    blocks: list[int]


def state_places(batch: Batch, limits: StageLimits) -> StatePlaces:
    """Returns the blocks of a batch's states: those in `batch.states` if states have their own blocks, or else the
    sequences' KV blocks. Raises ValueError if a block is missing."""
    if limits.state_blocks:
        return _own_places(batch, limits.state_blocks)
    places = StatePlaces([], [0], [], [])
    for sequence, (begin, end) in enumerate(pairwise(batch.sequence_starts.tolist())):
        table, first = batch.block_tables[batch.table_starts[sequence] :], int(batch.positions[begin])
        last = first + end - begin - 1
        places.before.append(-1 if first == 0 else int(table[(first - 1) // KV_BLOCK_TOKENS]))
        for block in range(first // KV_BLOCK_TOKENS, last // KV_BLOCK_TOKENS + 1):
            behind = min(last, (block + 1) * KV_BLOCK_TOKENS - 1)
            places.rows.append(begin + behind - first)
            places.blocks.append(int(table[block]))
        places.starts.append(len(places.rows))
    return places


def _own_places(batch: Batch, blocks: int) -> StatePlaces:
    states, sequences = batch.states, len(batch.sequence_starts) - 1
    if states is None:
        raise ValueError(f"batch: states are missing for {sequences} sequences")
    before, starts, rows, written = (
        numbers.tolist() for numbers in (states.before, states.starts, states.rows, states.blocks)
    )
    _check_counts(StatePlaces(before, starts, rows, written), sequences)
    for sequence, (begin, end) in enumerate(pairwise(batch.sequence_starts.tolist())):
        if batch.positions[begin] > 0:
            check_range("state block", before[sequence], 0, blocks)
        else:
            before[sequence] = -1
        least = begin
        for entry in range(starts[sequence], starts[sequence + 1]):
            check_range("row of a state", rows[entry], least, end)
            check_range("state block", written[entry], 0, blocks)
            least = rows[entry] + 1
        if least != end:
            raise ValueError(f"batch: last state is after row {least - 1}, expected {end - 1}")
    return StatePlaces(before, starts, rows, written)


def _check_counts(places: StatePlaces, sequences: int) -> None:
    starts, entries = places.starts, len(places.rows)
    for what, found, wanted in (
        ("number of states before sequences", len(places.before), sequences),
        ("number of starts of states", len(starts), sequences + 1),
        ("number of blocks of states", len(places.blocks), entries),
        ("first start of states", starts[0] if starts else -1, 0),
        ("last start of states", starts[-1] if starts else -1, entries),
    ):
        if found != wanted:
            raise ValueError(f"batch: {what} is {found}, expected {wanted}")
    for start, end in pairwise(starts):
        if end <= start:
            raise ValueError(f"batch: end of a sequence's states is {end}, expected {start + 1} or more")

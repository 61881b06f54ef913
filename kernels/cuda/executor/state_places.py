"""Where the states of a microbatch's sequences are read and written, in numbers for the device."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from llamaclust.core.limits import StageLimits
from llamaclust.kernels.backend import Batch
from llamaclust.model.program import KV_BLOCK_TOKENS


@dataclass(frozen=True, slots=True)
class StatePlaces:
    """The first row of sequence s reads the state in block before[s], or zeros where that is -1. Entries starts[s] to
    starts[s + 1] are written: the state behind rows[i] to blocks[i]."""

    before: list[int]
    starts: list[int]
    rows: list[int]
    blocks: list[int]


def state_places(batch: Batch, limits: StageLimits) -> StatePlaces:
    """As the batch says, where states have blocks of their own; else each KV block that rows reach has the state behind
    the last of its rows. ValueError where a block is not there."""
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
    states = batch.states
    if states is None or len(states.starts) != len(batch.sequence_starts):
        raise ValueError("batch: states against sequences")
    firsts = batch.positions[batch.sequence_starts[:-1]]
    before = [block if first else 0 for block, first in zip(states.before.tolist(), firsts.tolist(), strict=True)]
    used = [*before, *states.blocks.tolist()]
    if not 0 <= min(used) <= max(used) < blocks:
        raise ValueError(f"batch: state blocks [{min(used)}, {max(used)}] against {blocks}")
    ends = [int(states.rows[end - 1]) if end else -1 for end in states.starts[1:].tolist()]
    if ends != (batch.sequence_starts[1:] - 1).tolist() or len(states.rows) != len(states.blocks):
        raise ValueError("batch: the state behind a sequence's last row is not written")
    before = [block if first else -1 for block, first in zip(before, firsts.tolist(), strict=True)]
    return StatePlaces(before, states.starts.tolist(), states.rows.tolist(), states.blocks.tolist())

"""Where the states of a microbatch's sequences are read and written, in numbers for the device."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

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


def state_places(batch: Batch, *, windowed: bool) -> StatePlaces:
    """Each KV block that rows reach has the state behind the last of its rows; `windowed`: it is one of the windows'
    tables. ValueError where one is not there."""
    tables = batch.window_tables if windowed else batch.block_tables
    assert tables is not None, "a batch without window tables"
    places = StatePlaces([], [0], [], [])
    for sequence, (begin, end) in enumerate(pairwise(batch.sequence_starts.tolist())):
        table, first = tables[batch.table_starts[sequence] :], int(batch.positions[begin])
        last = first + end - begin - 1
        places.before.append(-1 if first == 0 else int(table[(first - 1) // KV_BLOCK_TOKENS]))
        for block in range(first // KV_BLOCK_TOKENS, last // KV_BLOCK_TOKENS + 1):
            behind = min(last, (block + 1) * KV_BLOCK_TOKENS - 1)
            places.rows.append(begin + behind - first)
            places.blocks.append(int(table[block]))
        places.starts.append(len(places.rows))
        used = table[max(0, first - 1) // KV_BLOCK_TOKENS : last // KV_BLOCK_TOKENS + 1]
        if int(used.min()) < 0:
            raise ValueError(f"batch: the {'window ' * windowed}block of a state is {used.min()}")
    return places

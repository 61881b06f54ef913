"""Block numbers of a chunk, as they come from a peer."""

from __future__ import annotations

from collections.abc import Sequence
from operator import add

from llamaclust.core.bounds import bounded
from llamaclust.core.limits import MAX_KV_BLOCKS
from llamaclust.core.sampling_bounds import MAX_CONTEXT_TOKENS

LAST_BLOCK = MAX_KV_BLOCKS - 1


def table_in(numbers: Sequence[int]) -> tuple[int, ...]:
    """Runs of blocks. ProtocolError for one out of bounds."""
    table = tuple(numbers)
    starts, counts = table[::2], table[1::2]
    bounded("runs of a table", len(counts), 1, MAX_CONTEXT_TOKENS)
    bounded("numbers of a table", len(table), 2 * len(counts), 2 * len(counts))
    bounded("blocks of a run", min(counts), 1, MAX_CONTEXT_TOKENS)
    bounded("last block of a run", max(map(add, starts, counts)) - 1, 0, MAX_KV_BLOCKS - 1)
    return table


def states_in(numbers: Sequence[int], tokens: int) -> tuple[int, ...]:
    """Rows in ascending order, all at last, each with a block."""
    states = tuple(numbers)
    pairs = bounded("states", len(states) // 2, 1, tokens)
    bounded("numbers of states", len(states), 2 * pairs, 2 * pairs)
    least = 1
    for rows in states[::2]:
        least = bounded("rows before a state", rows, least, tokens) + 1
    bounded("rows before the last state", states[-2], tokens, tokens)
    bounded("state block", max(states[1::2]), 0, LAST_BLOCK)
    return states

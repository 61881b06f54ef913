"""Block counts for states and for layers with a sliding window. Plans and the scheduler use the same counts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from llamaclust.model.costs import ModelCosts
from llamaclust.model.program import KV_BLOCK_TOKENS

Sizes = TypeVar("Sizes", int, NDArray[np.int64])
_MOST_STATE_POSITIONS = 1024
_SEQUENCES_A_CONTEXT = 4
"""KV memory holds several full-length sequences. Each after the first counts as this many shorter sequences."""


@dataclass(frozen=True, slots=True)
class KvSizes(Generic[Sizes]):
    """Byte counts for some layers. `token_bytes` is for one position's keys and values. `window_token_bytes` is the
    part of them that is in layers with a sliding window. `state_bytes` is for one sequence's state."""

    token_bytes: Sizes
    window_token_bytes: Sizes
    state_bytes: Sizes


@dataclass(frozen=True, slots=True)
class WindowGroup:
    """Layers that keep keys and values for a sliding window only. `window`, the largest, includes the row's own
    position. A block outside the window is released once the last microbatch that reads it has been made."""

    window: int
    rows: int  # the most rows of a microbatch

    @property
    def sequence_blocks(self) -> int:
        """The most blocks of one sequence, excluding prompt rows of the microbatch being made. It counts a window and
        one more position at any offset, one block that is not full, and one block for drafted rows."""
        return (self.window + KV_BLOCK_TOKENS - 3) // KV_BLOCK_TOKENS + 3

    @property
    def drafted_rows(self) -> int:
        return KV_BLOCK_TOKENS

    @property
    def row_blocks(self) -> int:
        return _blocks(self.rows)

    def first_seen(self, position: int) -> int:
        return max(0, position - self.window + 1) // KV_BLOCK_TOKENS

    def blocks_beside(self, kv_blocks: int, context_length: int, sequences: int) -> int:
        """Returns the group's block count if other layers have `kv_blocks`. The first full-length sequence in KV memory
        counts as one sequence. Each further one counts as several, because most sequences are shorter."""
        context = _blocks(context_length)
        further = -(-_SEQUENCES_A_CONTEXT * max(0, kv_blocks - context) * self.sequence_blocks // context)
        most = max(self.sequence_blocks, kv_blocks - self.row_blocks)  # never more than of other layers
        return min(sequences * self.sequence_blocks, self.sequence_blocks + further, most) + self.row_blocks


@dataclass(frozen=True, slots=True)
class StateGroup:
    """Blocks that each hold the states of all layers after one position. Each running sequence has one block. The other
    blocks are checkpoints, where sequences with the same tokens can begin.

    Running sequences' states take at most half as much memory as keys and values, and checkpoints take at most as much
    again. There are at least three blocks: for a running sequence, for the checkpoint at which the sequence began, and
    for the checkpoint that it leaves. A position with few KV bytes counts as 1/1024 of a state."""

    state_bytes: int  # bytes of a state in all layers
    kv_token_bytes: int  # bytes of a position in all layers

    @property
    def span(self) -> int:
        """Positions between checkpoints, a power of two. Their keys and values take about as much memory as a state."""
        positions = self.state_bytes // self._token_bytes
        return min(_MOST_STATE_POSITIONS, max(KV_BLOCK_TOKENS, 1 << (positions - 1).bit_length()))

    @property
    def _token_bytes(self) -> int:
        return max(self.kv_token_bytes, -(-self.state_bytes // _MOST_STATE_POSITIONS))

    def blocks_beside(self, kv_blocks: int, sequences: int) -> int:
        """Returns the block count: one for each running sequence whose state fits into half of the KV blocks' bytes (at
        least one), two for checkpoints, and one for each `span` positions whose state fits into the other half."""
        tokens = kv_blocks * KV_BLOCK_TOKENS
        half = tokens * self._token_bytes // (2 * self.state_bytes)
        return min(sequences, 1 + half) + 2 + min(tokens // self.span, half)


@dataclass(frozen=True, slots=True)
class KvGroups:
    window: WindowGroup | None  # None: layers with a window use KV blocks
    states: StateGroup | None
    context_length: int
    sequences: int

    @classmethod
    def of(cls, costs: ModelCosts, context_length: int, sequences: int, rows: int) -> KvGroups:
        states = StateGroup(costs.state_bytes, costs.kv_token_bytes) if costs.state_bytes else None
        return cls(window_group(costs.window, context_length, rows), states, context_length, sequences)

    def window_blocks(self, kv_blocks: int) -> int:
        return 0 if self.window is None else self.window.blocks_beside(kv_blocks, self.context_length, self.sequences)

    def state_blocks(self, kv_blocks: int) -> int:
        return 0 if self.states is None else self.states.blocks_beside(kv_blocks, self.sequences)

    @property
    def state_span(self) -> int:
        return KV_BLOCK_TOKENS if self.states is None else self.states.span

    def kv_bytes(self, of: KvSizes[Sizes], kv_blocks: int) -> Sizes:
        if self.window is None:
            tokens = of.token_bytes * (kv_blocks * KV_BLOCK_TOKENS)
        else:
            windowed = of.window_token_bytes * (self.window_blocks(kv_blocks) * KV_BLOCK_TOKENS)
            tokens = (of.token_bytes - of.window_token_bytes) * (kv_blocks * KV_BLOCK_TOKENS) + windowed
        return tokens + of.state_bytes * self.state_blocks(kv_blocks)


def window_group(window: int | None, context_length: int, rows: int) -> WindowGroup | None:
    """Returns the group of layers with a sliding window. Returns None if separate blocks would save no memory."""
    if window is None:
        return None
    group = WindowGroup(window, rows)
    return group if group.sequence_blocks + group.row_blocks < _blocks(context_length) else None


def _blocks(tokens: int) -> int:
    return -(-tokens // KV_BLOCK_TOKENS)

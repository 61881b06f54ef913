"""Numbers of blocks for layers with a sliding window and for states. Plans and the scheduler use the same numbers."""

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
"""The number of sequences that get window blocks for each full-length sequence in KV memory after the first one."""


@dataclass(frozen=True, slots=True)
class KvSizes(Generic[Sizes]):
    """Bytes of some layers. `token_bytes`: the keys and values of a position. `window_token_bytes`: the part of them in
    layers with a sliding window. `state_bytes`: the state of one sequence."""

    token_bytes: Sizes
    window_token_bytes: Sizes
    state_bytes: Sizes


@dataclass(frozen=True, slots=True)
class WindowGroup:
    """Layers that keep only the keys and values of a sliding window. `window`, their largest, includes the row's own
    position. A block outside the window is released after the last microbatch that reads it has been made."""

    window: int
    rows: int  # the most rows of a microbatch

    @property
    def sequence_blocks(self) -> int:
        """The most blocks of a sequence, without prompt rows of the microbatch being made: a window and one more
        position at any offset, a block that is not full, and one for drafted rows."""
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
        """Returns the group's number of blocks if other layers have `kv_blocks`: those of one sequence for the first
        full-length sequence, of several for each further one, because most sequences are shorter."""
        context = _blocks(context_length)
        further = -(-_SEQUENCES_A_CONTEXT * max(0, kv_blocks - context) * self.sequence_blocks // context)
        most = max(self.sequence_blocks, kv_blocks - self.row_blocks)  # never more than of other layers
        return min(sequences * self.sequence_blocks, self.sequence_blocks + further, most) + self.row_blocks


@dataclass(frozen=True, slots=True)
class StateGroup:
    """Blocks with the states of all layers after one position. A running sequence has one block. Other blocks are
    checkpoints, where sequences with the same tokens can begin.

    States of running sequences take up to half as much memory as keys and values, and checkpoints take as much again.
    There are at least three blocks: one of a running sequence, the checkpoint at which it began, and one that it
    leaves. A position whose KV bytes are few counts as a 1,024th of a state."""

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
        """Returns the sum of a block for each running sequence whose state fits into half of the KV blocks' bytes (at
        least one), two for checkpoints, and one for each `span` positions whose state fits into the other."""
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
    """Returns the group of layers with a sliding window; None if separate blocks for them would save no memory."""
    if window is None:
        return None
    group = WindowGroup(window, rows)
    return group if group.sequence_blocks + group.row_blocks < _blocks(context_length) else None


def _blocks(tokens: int) -> int:
    return -(-tokens // KV_BLOCK_TOKENS)

"""Calculates the numbers of sliding-window blocks and recurrent state blocks, for plans and for the scheduler."""

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
"""Assumed number of shorter sequences that share the KV memory of one full-length sequence."""
_FIRST_CONTEXT_SHARE = 4
"""Sequences that share the first context get window blocks for at most this part of its length (a quarter)."""


@dataclass(frozen=True, slots=True)
class KvSizes(Generic[Sizes]):
    """KV memory of some layers in bytes. `token_bytes` is for the keys and values of one position. It includes
    `window_token_bytes`, for layers with a sliding window. `state_bytes` is for the states of one sequence."""

    token_bytes: Sizes
    window_token_bytes: Sizes
    state_bytes: Sizes


@dataclass(frozen=True, slots=True)
class WindowGroup:
    """The layers with a sliding window. A row attends to at most `window` positions, including its own."""

    window: int
    rows: int  # Maximum number of rows in a microbatch.

    @property
    def sequence_blocks(self) -> int:
        """Maximum number of blocks that one sequence needs for its window, its newest row and drafted rows."""
        return (self.window + KV_BLOCK_TOKENS - 3) // KV_BLOCK_TOKENS + 3

    @property
    def shared_context(self) -> int:
        """The longest context for which separate blocks would save no memory."""
        return (self.sequence_blocks + self.row_blocks) * KV_BLOCK_TOKENS

    @property
    def drafted_rows(self) -> int:
        return KV_BLOCK_TOKENS

    @property
    def row_blocks(self) -> int:
        return _blocks(self.rows)

    def first_seen(self, position: int) -> int:
        return max(0, position - self.window + 1) // KV_BLOCK_TOKENS

    def blocks_beside(self, kv_blocks: int, context_length: int, sequences: int) -> int:
        """Returns the number of sliding-window blocks to plan if the other layers have `kv_blocks` blocks."""
        context, several = _blocks(context_length), _SEQUENCES_A_CONTEXT * self.sequence_blocks
        first = max(self.sequence_blocks, min(several, context // _FIRST_CONTEXT_SHARE))
        further = -(-several * max(0, kv_blocks - context) // context)
        # The group never needs more blocks than the other layers.
        most = max(self.sequence_blocks, kv_blocks - self.row_blocks)
        return min(sequences * self.sequence_blocks, first + further, most) + self.row_blocks


@dataclass(frozen=True, slots=True)
class StateGroup:
    """Blocks for recurrent states. A block holds the states of all layers after one position. Each running sequence has
    one block. The other blocks are checkpoints, from which sequences with the same first tokens can start."""

    state_bytes: int  # Bytes of one sequence's state in all layers.
    kv_token_bytes: int  # Bytes of one position's keys and values in all layers.

    @property
    def span(self) -> int:
        """Number of positions between checkpoints, a power of two."""
        positions = self.state_bytes // self._token_bytes
        return min(_MOST_STATE_POSITIONS, max(KV_BLOCK_TOKENS, 1 << (positions - 1).bit_length()))

    @property
    def _token_bytes(self) -> int:
        return max(self.kv_token_bytes, -(-self.state_bytes // _MOST_STATE_POSITIONS))

    def blocks_beside(self, kv_blocks: int, sequences: int) -> int:
        """Returns the number of state blocks to plan, including checkpoints, if there are `kv_blocks` KV blocks."""
        tokens = kv_blocks * KV_BLOCK_TOKENS
        # Running sequences and checkpoints may each take half as much memory as keys and values.
        half = tokens * self._token_bytes // (2 * self.state_bytes)
        return min(sequences, 1 + half) + 2 + min(tokens // self.span, half)


@dataclass(frozen=True, slots=True)
class KvGroups:
    window: WindowGroup | None  # None if layers with a sliding window use ordinary KV blocks.
    states: StateGroup | None
    context_length: int
    sequences: int
    least_window_blocks: int = 0

    @classmethod
    def of(cls, costs: ModelCosts, context_length: int, sequences: int, rows: int) -> KvGroups:
        states = StateGroup(costs.state_bytes, costs.kv_token_bytes) if costs.state_bytes else None
        return cls(window_group(costs.window, context_length, rows), states, context_length, sequences)

    def window_blocks(self, kv_blocks: int) -> int:
        if self.window is None:
            return 0
        blocks = self.window.blocks_beside(kv_blocks, self.context_length, self.sequences)
        return max(blocks, self.least_window_blocks)

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
    """Returns the group of layers with a sliding window, or None if separate blocks would save no memory."""
    if window is None:
        return None
    group = WindowGroup(window, rows)
    return group if context_length > group.shared_context else None


def _blocks(tokens: int) -> int:
    return -(-tokens // KV_BLOCK_TOKENS)

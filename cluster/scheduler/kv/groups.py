"""How many blocks layers with a window and states of sequences need: arithmetic that plans and the scheduler share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from llamaclust.model.costs import ModelCosts
from llamaclust.model.program import KV_BLOCK_TOKENS

Sizes = TypeVar("Sizes", int, NDArray[np.int64])
"""Of some layers, or of all stages as a table."""
_MOST_STATE_POSITIONS = 1024
_SEQUENCES_A_CONTEXT = 4
"""That may have their whole windows for each context of KV memory beyond the first."""


@dataclass(frozen=True, slots=True)
class KvSizes(Generic[Sizes]):
    """Bytes of layers: keys and values of a position, of these those in layers with a window, and a state of a
    sequence."""

    token_bytes: Sizes
    window_token_bytes: Sizes
    state_bytes: Sizes


@dataclass(frozen=True, slots=True)
class WindowGroup:
    """Layers that keep KV memory of their window alone, in blocks of their own; of several windows the largest counts.

    A row sees `window` positions, its own among them. Blocks behind the window are given up when a microbatch that may
    read them is made, so that rows of a prompt take blocks beside the window's while their microbatch is made.
    """

    window: int
    rows: int  # of a microbatch, at most

    @property
    def sequence_blocks(self) -> int:
        """What a sequence holds at most, but for the rows of a prompt that are in the microbatch being made: positions
        of a window and one more, wherever they begin in their blocks, a block for what such rows do not fill, and one
        for drafted rows."""
        return (self.window + KV_BLOCK_TOKENS - 3) // KV_BLOCK_TOKENS + 3

    @property
    def drafted_rows(self) -> int:
        """Of one sequence, at most."""
        return KV_BLOCK_TOKENS

    @property
    def row_blocks(self) -> int:
        """What rows of prompts in one microbatch take beside that."""
        return _blocks(self.rows)

    def first_seen(self, position: int) -> int:
        """The first block that rows from `position` on see."""
        return max(0, position - self.window + 1) // KV_BLOCK_TOKENS

    def blocks_beside(self, kv_blocks: int, context_length: int, sequences: int) -> int:
        """Blocks of the group beside so many of other layers, for up to so many sequences: one sequence's where these
        hold one whole context, and for each further context those of several, since most sequences are shorter."""
        context = _blocks(context_length)
        further = -(-_SEQUENCES_A_CONTEXT * max(0, kv_blocks - context) * self.sequence_blocks // context)
        most = max(self.sequence_blocks, kv_blocks - self.row_blocks)  # never more than of other layers
        return min(sequences * self.sequence_blocks, self.sequence_blocks + further, most) + self.row_blocks


@dataclass(frozen=True, slots=True)
class StateGroup:
    """States of sequences, in blocks of their own: each the state of all layers behind one position. A running sequence
    has one, others are checkpoints, where sequences with the same tokens can begin.

    All states together take at most about as much memory as the keys and values: states of running sequences up to a
    half of it, checkpoints up to the other half. Three blocks are there in any case: that of one running sequence, the
    checkpoint that it began at and reads, and one that it leaves. Where a position has few bytes of keys and values, or
    none, they are taken to be a 1,024th of a state.
    """

    state_bytes: int  # in all layers
    kv_token_bytes: int  # of a position in all layers

    @property
    def span(self) -> int:
        """Positions from one checkpoint to the next: a power of two, whose states cost what its keys and values do."""
        positions = self.state_bytes // self._token_bytes
        return min(_MOST_STATE_POSITIONS, max(KV_BLOCK_TOKENS, 1 << (positions - 1).bit_length()))

    @property
    def _token_bytes(self) -> int:
        return max(self.kv_token_bytes, -(-self.state_bytes // _MOST_STATE_POSITIONS))

    def blocks_beside(self, kv_blocks: int, sequences: int) -> int:
        """State blocks beside so many KV blocks, for up to so many sequences.

        The sum of: a block for each running sequence, one at least, further ones while they fit into half of the KV
        blocks' bytes; two for the checkpoints that a sequence begins at and leaves; and a checkpoint for each `span`
        positions of the KV blocks, as many as fit into the other half.
        """
        tokens = kv_blocks * KV_BLOCK_TOKENS
        half = tokens * self._token_bytes // (2 * self.state_bytes)
        return min(sequences, 1 + half) + 2 + min(tokens // self.span, half)


@dataclass(frozen=True, slots=True)
class KvGroups:
    """The blocks that KV memory of a model is divided into, for sequences of so many tokens at most: those of all
    layers, those of layers with a window, and states."""

    window: WindowGroup | None  # None: such layers have blocks as all others
    states: StateGroup | None
    context_length: int
    sequences: int

    @classmethod
    def of(cls, costs: ModelCosts, context_length: int, sequences: int, rows: int) -> KvGroups:
        """`rows`: of a microbatch, at most."""
        states = StateGroup(costs.state_bytes, costs.kv_token_bytes) if costs.state_bytes else None
        return cls(window_group(costs.window, context_length, rows), states, context_length, sequences)

    def window_blocks(self, kv_blocks: int) -> int:
        """Beside so many blocks of other layers; 0 where all layers have these."""
        return 0 if self.window is None else self.window.blocks_beside(kv_blocks, self.context_length, self.sequences)

    def state_blocks(self, kv_blocks: int) -> int:
        """Beside so many KV blocks; 0 where no layer has states."""
        return 0 if self.states is None else self.states.blocks_beside(kv_blocks, self.sequences)

    @property
    def state_span(self) -> int:
        """Positions from one state that is kept to the next."""
        return KV_BLOCK_TOKENS if self.states is None else self.states.span

    def kv_bytes(self, of: KvSizes[Sizes], kv_blocks: int) -> Sizes:
        """Of layers of such sizes, with so many blocks."""
        if self.window is None:
            tokens = of.token_bytes * (kv_blocks * KV_BLOCK_TOKENS)
        else:
            windowed = of.window_token_bytes * (self.window_blocks(kv_blocks) * KV_BLOCK_TOKENS)
            tokens = (of.token_bytes - of.window_token_bytes) * (kv_blocks * KV_BLOCK_TOKENS) + windowed
        return tokens + of.state_bytes * self.state_blocks(kv_blocks)


def window_group(window: int | None, context_length: int, rows: int) -> WindowGroup | None:
    """None where blocks of their own would save such layers nothing."""
    if window is None:
        return None
    group = WindowGroup(window, rows)
    return group if group.sequence_blocks + group.row_blocks < _blocks(context_length) else None


def _blocks(tokens: int) -> int:
    return -(-tokens // KV_BLOCK_TOKENS)

"""Ends a lane (a pipeline with its scheduler) while its sequences move to another lane without a pause."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from math import inf
from operator import attrgetter
from time import monotonic_ns

from llamaclust.cluster.engine.lane import Lane
from llamaclust.cluster.scheduler.counts import Counts
from llamaclust.cluster.scheduler.requests import Failed, GenerationRequest, Update
from llamaclust.cluster.scheduler.sequence_choice import request_key
from llamaclust.cluster.scheduler.sequences import Phase, Sequence
from llamaclust.core.errors import LlamaclustError
from llamaclust.model.program import KV_BLOCK_TOKENS

_TAIL_TOKENS = 3 * KV_BLOCK_TOKENS
"""Maximum number of tokens that the new lane may still have to compute when a sequence moves."""
_LEAST_LEFT = 32
"""Minimum number of tokens that a sequence must have left to generate. Sequences with fewer tokens do not move."""


@dataclass(frozen=True, slots=True)
class _PreCopy:
    """A copy of an old lane's sequence. Computing the copy fills the new lane's prefix cache."""

    key: int
    of: Sequence
    tokens: int
    tail: float  # Number of tokens that were generated during the previous pre-copy. Infinite for the first one.


class Retirement:
    """Moves sequences from `old` to `new`. Before a decoding sequence moves, the new lane computes its KV blocks."""

    def __init__(self, old: Lane, new: Lane) -> None:
        self.old = old
        self.new = new
        # The error that ended the old pipeline before all sequences had moved.
        self.error: LlamaclustError | None = None
        self.ended = asyncio.Event()
        self._pre_copy: _PreCopy | None = None
        self._moving: Sequence | None = None  # Sequence that moved last. The next pre-copy waits until it decodes.
        self._staying: set[int] = set()  # Keys of the sequences that could not be copied.
        old.scheduler.is_shared = new.scheduler.is_shared = True

    def receive(self, updated: list[tuple[int, list[Update]]]) -> list[tuple[int, list[Update]]]:
        pre_copy = self._pre_copy
        if pre_copy is None:
            return updated
        own = [updates for key, updates in updated if key == pre_copy.key]
        if own:
            self._pre_copy = None
            if isinstance(own[-1][-1], Failed):
                self._staying.add(pre_copy.of.key)
            elif self._is_on_old(pre_copy.of):
                self._copied(pre_copy)
        return [(key, updates) for key, updates in updated if key != pre_copy.key]

    def advance(self) -> None:
        """Moves all sequences that can move now."""
        old = self.old.scheduler
        self._take_over(old.movable)
        if self._pre_copy is not None and not self._is_on_old(self._pre_copy.of):
            self._drop_pre_copy()
        if self._pre_copy is None and (sequence := self._next()) is not None:
            self._start_pre_copy(sequence)

    @property
    def is_over(self) -> bool:
        return not self.old.scheduler.sequences

    def hurry(self) -> None:
        self._drop_pre_copy()
        old = self.old.scheduler
        self._staying.update(sequence.key for sequence in old.sequences)
        for sequence in old.sequences:
            old.queues.end_restore(sequence)
            old.put_back(sequence)
        self._take_over(old.movable)

    def end(self, error: LlamaclustError | None) -> Counts:
        """Stops the old lane and returns its counts. The new lane computes the remaining sequences again."""
        self.error = error
        self.old.stop()
        self._drop_pre_copy()
        self._take_over(self.old.scheduler.sequences)
        self.new.scheduler.is_shared = False
        self.ended.set()
        return self.old.scheduler.counts.totals

    def _take_over(self, sequences: list[Sequence]) -> None:
        if sequences:
            self.new.scheduler.take_over(self.old.scheduler, sequences)
            for sequence in sequences:
                self.new.arrived(sequence)

    def _is_on_old(self, sequence: Sequence) -> bool:
        return sequence in self.old.scheduler.queues.running

    def _next(self) -> Sequence | None:
        if self._moving is not None and self._moving.phase not in (Phase.DECODE, Phase.FINISHED):
            return None
        movable = [
            sequence
            for sequence in self.old.scheduler.queues.running
            if sequence.phase is Phase.DECODE and sequence.key not in self._staying
        ]
        longest = max(movable, key=attrgetter("left"), default=None)
        if longest is None or longest.left < _LEAST_LEFT or not self._can_copy(longest):
            return None
        return longest

    def _can_copy(self, sequence: Sequence) -> bool:
        new = self.new.scheduler
        return new.settings.prefix_cache and new.has_room_for(sequence)

    def _start_pre_copy(self, sequence: Sequence, tail: float = inf) -> None:
        request = sequence.request
        name, tokens = f"{request.request_id} (pre-copy)", tuple(sequence.tokens)
        copy = GenerationRequest(
            name,
            tokens,
            1,
            cache_salt=request.cache_salt,
            adapters=request.adapters,
            images=request.images,
            group=request_key(sequence),
            owner=request.owner,
        )
        added = self.new.scheduler.add(copy, monotonic_ns())
        self._pre_copy = _PreCopy(added.key, sequence, len(tokens), tail)
        self.new.launch_soon()

    def _copied(self, pre_copy: _PreCopy) -> None:
        sequence = pre_copy.of
        tail = len(sequence.tokens) - pre_copy.tokens
        if _TAIL_TOKENS < tail < pre_copy.tail and self._can_copy(sequence):
            self._start_pre_copy(sequence, tail)
        else:
            self.old.scheduler.put_back(sequence)
            self._moving = sequence

    def _drop_pre_copy(self) -> None:
        if self._pre_copy is not None:
            self.new.scheduler.abort(self._pre_copy.key)
            self._pre_copy = None

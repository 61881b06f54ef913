from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Items

from llamaclust.cluster.scheduler.kv.prefix_cache import PrefixCache
from llamaclust.cluster.scheduler.sequences import Sequence
from llamaclust.model.program import KV_BLOCK_TOKENS


class KvStates:
    """Manages blocks of recurrent states. A running sequence overwrites its own block. The other blocks are
    checkpoints, which never change and from which sequences with the same first tokens start."""

    def __init__(self, span: int, cache: PrefixCache) -> None:
        self.blocks = cache.blocks
        self._span = span
        self._cache = cache
        self._lacking = 0  # Number of started sequences without a block for their next rows.
        # Blocks to release when the current microbatch has been made, so that no other sequence in it overwrites them.
        self._used: list[int] = []

    def usable(self, keys: Items[bytes], found: int) -> int:
        return next((end for end in range(found, 0, -1) if self.blocks.is_idle(keys[end - 1]) is not None), 0)

    def can_begin(self, sequences: int, checkpoint: bytes | None = None) -> bool:
        is_taken = checkpoint is not None and self.blocks.is_idle(checkpoint) is True
        return self.blocks.available - is_taken >= self._lacking + sequences

    def begin(self, sequence: Sequence, shared: int) -> None:
        states = sequence.kv.states
        states.is_begun = True
        states.read = self.blocks.acquire(sequence.kv.keys[shared - 1]) if shared else None
        self._lacking += 1

    def reserve(self, sequence: Sequence, rows: int) -> None:
        states = sequence.kv.states
        if states.own is None:
            states.own = self.blocks.take()
            self._lacking -= 1
        start = max([sequence.scheduled, *(place for place, _ in states.marks)]) + 1
        end = sequence.scheduled + rows
        states.marks += [(place, self.blocks.take()) for place in self._checkpoints(sequence, start, end)]

    def filled(self, sequence: Sequence) -> None:
        states = sequence.kv.states
        for position, block in states.marks:
            self._register(sequence, position, block)
            self._used.append(block)
        states.marks.clear()
        self._register_last(sequence)
        if states.ahead is not None:
            return
        if states.read is not None and states.read != states.own:
            self._used.append(states.read)
        states.read = states.own
        self._keep_last(sequence)

    def draft(self, sequence: Sequence) -> bool:
        if self.blocks.available <= self._lacking:
            return False
        sequence.kv.states.ahead = self.blocks.take()
        return True

    def settle(self, sequence: Sequence, *, is_whole: bool) -> None:
        states = sequence.kv.states
        if states.ahead is None:
            return
        if not is_whole:
            self.blocks.release((states.ahead,))
            states.ahead = None
            return
        self.blocks.release({block for block in (states.read, states.own) if block is not None})
        states.read = states.own = states.ahead
        states.ahead = states.unregistered = None
        self._keep_last(sequence)

    def _keep_last(self, sequence: Sequence) -> None:
        states = sequence.kv.states
        if any(self._checkpoints(sequence, sequence.scheduled, sequence.scheduled + 1)):
            states.own, states.unregistered = None, sequence.scheduled
            self._lacking += 1
            self._register_last(sequence)

    def end_microbatch(self) -> None:
        if self._used:
            self.blocks.release(self._used)
            self._used.clear()

    def release(self, sequence: Sequence) -> None:
        states = sequence.kv.states
        if states.is_begun:
            self._lacking -= states.own is None
            self.blocks.release(states.clear())

    def _checkpoints(self, sequence: Sequence, start: int, end: int) -> Iterator[int]:
        if not self._cache.is_enabled:
            return
        last = (sequence.prompt_length - 1) // KV_BLOCK_TOKENS * KV_BLOCK_TOKENS
        places = {
            *range(-(-start // self._span) * self._span, end, self._span),
            *((last,) if start <= last < end else ()),
        }
        for position in sorted(places):
            if position and self.blocks.available > self._lacking:
                yield position

    def _register_last(self, sequence: Sequence) -> None:
        states = sequence.kv.states
        if states.unregistered is not None and states.read is not None and states.unregistered <= len(sequence.tokens):
            self._register(sequence, states.unregistered, states.read)
            states.unregistered = None

    def _register(self, sequence: Sequence, position: int, block: int) -> None:
        number = position // KV_BLOCK_TOKENS - 1
        self._cache.register(sequence.kv.keys, sequence.tokens, [block], number, number + 1, number)

"""Assigns KV blocks to sequences, shares blocks of equal prefixes, and releases blocks."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass
from functools import partial
from itertools import chain

from llamaclust.cluster.scheduler.kv.blocks import KvBlocks
from llamaclust.cluster.scheduler.kv.prefix_cache import PrefixCache
from llamaclust.cluster.scheduler.kv.states import KvStates
from llamaclust.cluster.scheduler.kv.transfers import KvTransfers
from llamaclust.cluster.scheduler.kv.window import KvWindow
from llamaclust.cluster.scheduler.sequences import Sequence
from llamaclust.cluster.scheduler.settings import SchedulerSettings
from llamaclust.model.program import KV_BLOCK_TOKENS

RESERVE_BLOCKS = 2
"""Number of blocks that stay free per running sequence when another sequence starts. Otherwise the new sequence could
be preempted at once."""


@dataclass(frozen=True, slots=True)
class _Refusal:
    room: int
    missing: bytes | None


class KvMemory:
    def __init__(self, settings: SchedulerSettings) -> None:
        cache = partial(
            PrefixCache, model_id=settings.model_id, kv_type=settings.kv_type, enabled=settings.prefix_cache
        )
        group = settings.window_group
        self.blocks = KvBlocks(settings.kv_blocks)
        self._cache = cache(self.blocks)
        self.window = None if group is None else KvWindow(group, cache(KvBlocks(settings.window_blocks)))
        states = settings.state_blocks
        self.states = KvStates(settings.state_span, cache(KvBlocks(states))) if states else None
        self._filling: set[bytes] = set()
        # Refused sequences by key. A refusal holds until more blocks are free or the missing block is cached. None:
        # window or state blocks were short, which is checked again each time.
        self._refused: dict[int, _Refusal | None] = {}
        self.transfers = KvTransfers(self.blocks, self._cache)

    def begin_microbatch(self) -> None:
        self._filling.clear()

    def admit(self, sequence: Sequence, reserve: int) -> bool:
        """Gives a sequence blocks for all of its rows, and leaves `reserve` blocks free. Returns False if memory does
        not suffice, or if the current microbatch is still filling a cached block that the sequence would use."""
        found = self._begin_with(sequence, reserve)
        if found is None or (self._filling and not self._filling.isdisjoint(sequence.kv.keys[:found])):
            return False
        fresh = sequence.blocks_needed - found
        for key in sequence.kv.keys[:found]:
            sequence.kv.table.append(self.blocks.acquire(key))
        for _ in range(fresh):
            sequence.kv.table.append(self.blocks.take())
        if self.window is not None:
            self.window.begin(sequence, found)
        if self.states is not None:
            self.states.begin(sequence, found)
        sequence.rewind(found * KV_BLOCK_TOKENS)
        return True

    def can_hold(self, sequence: Sequence) -> bool:
        """True if the sequence fits when no other sequence uses memory."""
        return sequence.target <= self.blocks.count * KV_BLOCK_TOKENS

    def has_room_for(self, sequences: tuple[Sequence, ...], reserve: int) -> bool:
        has_window = self.window is None or self.window.can_begin(sequences, reserve)
        has_states = self.states is None or self.states.can_begin(len(sequences))
        return (
            has_window
            and has_states
            and sum(each.blocks_needed for each in sequences) + reserve <= self.blocks.available
        )

    def _begin_with(self, sequence: Sequence, reserve: int) -> int | None:
        """Returns the number of cached blocks that the sequence can begin with, or None if memory does not suffice."""
        if (refused := self._refused.pop(sequence.key, None)) is not None and self._is_unchanged(refused, reserve):
            self._refused[sequence.key] = refused
            return None
        found, idle = self._find(sequence)
        if sequence.blocks_needed - found + idle + reserve > self.blocks.available:
            missing = sequence.kv.keys[found] if found < len(sequence.kv.keys) else None
            refusal = _Refusal(self.blocks.available - reserve, missing)
            # If another sequence takes the idle blocks, this sequence needs less room.
            self._refused[sequence.key] = None if idle else refusal
            return None
        checkpoint = sequence.kv.keys[found - 1] if found else None
        has_window = self.window is None or self.window.can_begin((sequence,), reserve)
        if not has_window or not (self.states is None or self.states.can_begin(1, checkpoint)):
            self._refused[sequence.key] = None
            return None
        return found

    def _find(self, sequence: Sequence) -> tuple[int, int]:
        """Returns the number of cached blocks that the sequence can begin with, and how many of these are idle."""
        found, idle = self._cache.find(sequence.kv.keys, sequence.tokens, sequence.first_output)
        if (usable := self._usable(sequence, found)) < found:
            found = usable
            idle = sum(self.blocks.is_idle(key) is True for key in sequence.kv.keys[:found])
        return found, idle

    def _usable(self, sequence: Sequence, found: int) -> int:
        before = found + 1
        while 0 < found < before:
            before = found
            found = found if self.window is None else self.window.usable(sequence.kv.keys, found)
            found = found if self.states is None else self.states.usable(sequence.kv.keys, found)
        return found

    def lacks_blocks(self, sequence: Sequence, reserve: int) -> bool:
        return self._begin_with(sequence, reserve) is None

    def room_with(self, running: Items[Sequence], sequence: Sequence) -> object:
        """Returns a value that changes if the result of `suffices_without` may change for the same running sequences.
        Requires that `lacks_blocks` was called for `sequence`."""
        held = sum(len(other.kv.table) for other in running)
        states = None if self.states is None else self.states.blocks.available
        return self.blocks.available + held, states, self.transfers.ended, self._refused.get(sequence.key)

    def suffices_without(self, others: Items[Sequence], sequence: Sequence, reserve: int) -> bool:
        """Returns True if `sequence` has room when the running sequences `others` have released their memory."""
        found, idle = self._find(sequence)
        held = chain.from_iterable(other.kv.table.blocks for other in others)
        released = self.blocks.released(held, sequence.kv.keys[:found])
        return (
            sequence.blocks_needed - found + idle + reserve <= self.blocks.available + released
            and (self.window is None or self.window.suffices_without(others, sequence))
            and (self.states is None or self.states.can_begin(1 - len(others)))
        )

    def _is_unchanged(self, refused: _Refusal, reserve: int) -> bool:
        is_cached = refused.missing is not None and self.blocks.is_idle(refused.missing) is not None
        return self.blocks.available - reserve <= refused.room and not is_cached

    def grow(self, sequence: Sequence) -> bool:
        if not self.extend(sequence):
            return False
        if self.window is not None or self.states is not None:
            self.reserve(sequence, sequence.next_rows)
        return True

    def draft(self, sequence: Sequence, tokens: tuple[int, ...], reserve: int) -> None:
        sequence.drafting.next = tokens
        more = sequence.blocks_needed - len(sequence.kv.table)
        is_full = more > 0 and self.blocks.available < more + reserve
        if is_full or not self.extend(sequence) or not (self.states is None or self.states.draft(sequence)):
            sequence.drafting.next = ()
        elif self.window is not None:
            self.window.reserve(sequence, sequence.next_rows + len(tokens))

    def settle(self, sequence: Sequence, *, is_whole: bool) -> None:
        """Keeps the memory of accepted drafts and releases the rest. `is_whole` means that all drafts were accepted."""
        if self.states is not None:
            self.states.settle(sequence, is_whole=is_whole)
        if sequence.is_running:
            self._register(sequence)  # Full blocks are registered now, because there may be no later microbatch.
            if self.window is not None:
                self.window.settle(sequence)

    def finished(self, sequence: Sequence) -> None:
        if sequence.is_running and self.states is None:
            self._register(sequence)

    def extend(self, sequence: Sequence) -> bool:
        if self.window is not None and not self.window.commit(sequence):
            return False
        while len(sequence.kv.table) < sequence.blocks_needed:
            if not self.blocks.available:
                return False
            sequence.kv.table.append(self.blocks.take())
        return True

    def reserve(self, sequence: Sequence, rows: int) -> None:
        if self.window is not None:
            self.window.reserve(sequence, rows)
        if self.states is not None:
            self.states.reserve(sequence, rows)

    def filled(self, sequence: Sequence) -> None:
        """Registers the sequence's full blocks in the prefix cache. Must be called after its rows were scheduled."""
        self._register(sequence)
        if self.window is not None:
            self.window.release_out_of_window(sequence)
        if self.states is not None:
            self.states.filled(sequence)

    def _register(self, sequence: Sequence) -> None:
        kv, full = sequence.kv, min(sequence.scheduled, len(sequence.tokens)) // KV_BLOCK_TOKENS
        if full > kv.registered:
            self._cache.register(kv.keys, sequence.tokens, kv.table.blocks, kv.registered, full)
            if self.window is not None:
                self.window.register(sequence, full)
            self._filling.update(kv.keys[kv.registered : full])
            kv.registered = full

    def end_microbatch(self) -> None:
        if self.window is not None:
            self.window.end_microbatch()
        if self.states is not None:
            self.states.end_microbatch()

    def invalidate(self, sequence: Sequence) -> None:
        self.blocks.invalidate(sequence.kv.keys)
        if self.window is not None:
            self.window.blocks.invalidate(sequence.kv.keys)
        if self.states is not None:
            self.states.blocks.invalidate(sequence.kv.keys)

    def release(self, sequence: Sequence) -> None:
        self._refused.pop(sequence.key, None)
        self.blocks.release(sequence.kv.table.clear())
        if self.window is not None:
            self.window.release(sequence)
        if self.states is not None:
            self.states.release(sequence)
        sequence.rewind(0)

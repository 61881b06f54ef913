from __future__ import annotations

from collections.abc import Sequence as Items

from llamaclust.cluster.scheduler.kv.groups import WindowGroup
from llamaclust.cluster.scheduler.kv.prefix_cache import PrefixCache
from llamaclust.cluster.scheduler.sequences import Sequence
from llamaclust.model.program import KV_BLOCK_TOKENS


class KvWindow:
    """The KV blocks of layers with a sliding window. A sequence may start or grow only if all blocks that it may need
    can be reserved."""

    def __init__(self, group: WindowGroup, cache: PrefixCache) -> None:
        self.group = group
        self.blocks = cache.blocks
        self._cache = cache
        self._begun = 0
        self._committed = 0
        self._most = cache.blocks.count - group.row_blocks
        # Blocks to release when the current microbatch has been made, so that no other sequence in it overwrites them.
        self._out_of_window: list[int] = []

    def usable(self, keys: Items[bytes], found: int) -> int:
        """Returns how many leading blocks a new sequence can reuse. The window of its next row must be cached."""
        usable = together = 0
        for index in range(found):
            together = 0 if self.blocks.is_idle(keys[index]) is None else together + 1
            end = index + 1
            if together >= end - self.group.first_seen(end * KV_BLOCK_TOKENS):
                usable = end
        return usable

    def can_begin(self, sequences: Items[Sequence], reserve: int) -> bool:
        growth = self._begun * self.group.sequence_blocks - self._committed
        return self._committed + sum(map(self._need, sequences)) + min(reserve, growth) <= self._most

    def suffices_without(self, others: Items[Sequence], sequence: Sequence) -> bool:
        kept = self._committed - sum(other.kv.window.committed for other in others)
        return kept + self._need(sequence) <= self._most

    def begin(self, sequence: Sequence, shared: int) -> None:
        self._begun += 1
        self.commit(sequence)
        table = sequence.kv.window
        table.start = self.group.first_seen(shared * KV_BLOCK_TOKENS)
        for key in sequence.kv.keys[table.start : shared]:
            table.append(self.blocks.acquire(key))

    def commit(self, sequence: Sequence) -> bool:
        more = self._need(sequence) - sequence.kv.window.committed
        if more > 0:
            if self._committed + more > self._most:
                return False
            self._committed += more
            sequence.kv.window.committed += more
        return True

    def _need(self, sequence: Sequence) -> int:
        return min(self.group.sequence_blocks, sequence.blocks_needed)

    def reserve(self, sequence: Sequence, rows: int) -> None:
        for _ in range(sequence.kv.window.end, -(-(sequence.scheduled + rows) // KV_BLOCK_TOKENS)):
            sequence.kv.window.append(self.blocks.take())

    def register(self, sequence: Sequence, full: int) -> None:
        table = sequence.kv.window
        first = max(sequence.kv.registered, table.start)
        self._cache.register(sequence.kv.keys, sequence.tokens, table.blocks, first, full, table.start)

    def release_out_of_window(self, sequence: Sequence) -> None:
        self._out_of_window += sequence.kv.window.drop_before(self.group.first_seen(sequence.first_unverified))

    def settle(self, sequence: Sequence) -> None:
        table, kept = sequence.kv.window, -(-sequence.scheduled // KV_BLOCK_TOKENS)
        if table.end > max(kept, table.start):
            self.blocks.release(table.drop_behind(max(kept, table.start)))

    def end_microbatch(self) -> None:
        if self._out_of_window:
            self.blocks.release(self._out_of_window)
            self._out_of_window.clear()

    def release(self, sequence: Sequence) -> None:
        self._begun -= sequence.kv.window.committed > 0
        self._committed -= sequence.kv.window.committed
        self.blocks.release(sequence.kv.window.clear())

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable


class KvBlocks:
    """A pool of reference-counted KV blocks. Their holders are sequences and transfers. A registered block without
    holders is idle: `acquire` still finds it, until `take` reuses it."""

    def __init__(self, count: int) -> None:
        self.count = count
        # The last block in the list is taken first, so that memory in CPU caches is reused.
        self._free = list(range(count - 1, -1, -1))
        self._holders = [0] * count
        self._keys: dict[int, bytes] = {}
        self._by_key: dict[bytes, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()

    @property
    def available(self) -> int:
        return len(self._free) + len(self._idle)

    @property
    def held(self) -> int:
        return self.count - self.available

    def holders(self, block: int) -> int:
        return self._holders[block]

    def released(self, held: Iterable[int], kept: Iterable[bytes]) -> int:
        """Returns how many blocks become available if one holder of each block in `held` releases it. A block can be in
        `held` several times. Blocks that are registered with a key in `kept` do not count."""
        holders = Counter(held)
        for key in kept:
            del holders[self._by_key[key]]
        return sum(self._holders[block] == count for block, count in holders.items())

    def take(self) -> int:
        """Takes a free or idle block, whose content is undefined. Requires `available` > 0."""
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._idle.popitem(last=False)
            del self._by_key[self._keys.pop(block)]
        assert self._holders[block] == 0
        self._holders[block] = 1
        return block

    def acquire(self, key: bytes) -> int:
        """Adds a holder to the block registered with this key, and returns the block. Holders must not write to it."""
        block = self._by_key[key]
        self._idle.pop(block, None)
        self._holders[block] += 1
        return block

    def is_idle(self, key: bytes) -> bool | None:
        block = self._by_key.get(key)
        return None if block is None else block in self._idle

    def holds(self, block: int, key: bytes) -> bool:
        return self._by_key.get(key) == block

    def register(self, block: int, key: bytes) -> None:
        """Registers a full block so that `acquire` finds it. Its content must not change again. Does nothing if another
        block is registered with the same key."""
        assert self._holders[block] > 0
        if key not in self._by_key and block not in self._keys:
            self._by_key[key] = block
            self._keys[block] = key

    def invalidate(self, keys: Iterable[bytes]) -> None:
        for block in [self._by_key.pop(key) for key in keys if key in self._by_key]:
            del self._keys[block]
            if block in self._idle:
                del self._idle[block]
                self._free.append(block)

    def release(self, blocks: Iterable[int]) -> None:
        for block in reversed(list(blocks)):
            self._holders[block] -= 1
            assert self._holders[block] >= 0, "a block was released twice"
            if self._holders[block] == 0:
                if block in self._keys:
                    self._idle[block] = None
                else:
                    self._free.append(block)


class BlockTable:
    """The KV blocks of one sequence in order of position. blocks[i] holds KV_BLOCK_TOKENS positions, beginning with
    position (start + i) * KV_BLOCK_TOKENS. `start` is 0 unless a sliding window has dropped old blocks."""

    __slots__ = ("_runs", "_shown", "blocks", "committed", "start")

    def __init__(self) -> None:
        self.blocks: list[int] = []
        self.start = 0
        # Number of sliding-window blocks promised to the sequence.
        self.committed = 0
        self._runs: list[int] = []  # Runs of consecutive block numbers, in the format of `Chunk.table`.
        self._shown: tuple[int, ...] | None = None

    def __len__(self) -> int:
        return len(self.blocks)

    @property
    def end(self) -> int:
        return self.start + len(self.blocks)

    @property
    def runs(self) -> tuple[int, ...]:
        if self._shown is None:
            self._shown = tuple(self._runs)
        return self._shown

    def append(self, block: int) -> None:
        self.blocks.append(block)
        self._shown = None
        if self._runs and sum(self._runs[-2:]) == block:
            self._runs[-1] += 1
        else:
            self._runs += (block, 1)

    def drop_before(self, first: int) -> list[int]:
        count = first - self.start
        if count <= 0:
            return []
        committed, blocks = self.committed, self.clear()
        self.start, self.committed = first, committed
        for block in blocks[count:]:
            self.append(block)
        return blocks[:count]

    def drop_behind(self, end: int) -> list[int]:
        start, committed, blocks = self.start, self.committed, self.clear()
        self.start, self.committed = start, committed
        for block in blocks[: end - start]:
            self.append(block)
        return blocks[end - start :]

    def clear(self) -> list[int]:
        blocks, self.blocks = self.blocks, []
        self.start = self.committed = 0
        self._runs.clear()
        self._shown = None
        return blocks

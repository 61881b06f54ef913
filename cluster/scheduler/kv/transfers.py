"""Transfers of KV blocks to and from disk. A transfer holds its blocks, so that no sequence overwrites them."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass
from itertools import takewhile

from llamaclust.cluster.scheduler.kv.blocks import KvBlocks
from llamaclust.cluster.scheduler.kv.prefix_cache import PrefixCache
from llamaclust.cluster.scheduler.sequences import Sequence
from llamaclust.model.program import KV_BLOCK_TOKENS


@dataclass(frozen=True, slots=True)
class Transfer:
    """KV blocks that are being saved to disk or restored from disk. `keys` begins at the sequence's first block. The
    last len(blocks) of these keys belong to `blocks`. The first `found` of `blocks` were already cached."""

    keys: tuple[bytes, ...]
    blocks: tuple[int, ...]
    found: int = 0


class KvTransfers:
    def __init__(self, blocks: KvBlocks, cache: PrefixCache) -> None:
        self._blocks = blocks
        self._cache = cache
        self._under_way = 0
        self.ended = 0  # Number of ended transfers.

    @property
    def are_under_way(self) -> bool:
        return self._under_way > 0

    def missing(self, sequence: Sequence) -> range:
        found, _ = self._cache.find(sequence.kv.keys, sequence.tokens, sequence.first_output)
        return range(found, sequence.first_output // KV_BLOCK_TOKENS)

    def begin_restore(self, sequence: Sequence, end: int, reserve: int) -> Transfer | None:
        """Prepares to restore `end` blocks: pins the cached ones and takes free blocks for the others. Returns None if
        all are cached or too few are free. Write to them only after the microbatches in flight."""
        found, idle = self._cache.find(sequence.kv.keys, sequence.tokens, sequence.first_output)
        if found >= end or end - found + idle + reserve > self._blocks.available:
            return None
        prefix = [self._blocks.acquire(key) for key in sequence.kv.keys[:found]]
        taken = [self._blocks.take() for _ in range(found, end)]
        self._under_way += 1
        return Transfer(tuple(sequence.kv.keys[:end]), (*prefix, *taken), found)

    def begin_save(self, keys: Items[bytes], start: int) -> Transfer | None:
        """Pins the cached blocks for keys[start:], up to the first missing block, so that they can be saved. Returns
        None if the first block is not cached. Microbatches in flight may still be filling these blocks."""
        there = list(takewhile(lambda key: self._blocks.is_idle(key) is not None, keys[start:]))
        if not there:
            return None
        self._under_way += 1
        return Transfer((*keys[:start], *there), tuple(map(self._blocks.acquire, there)))

    def are_shared(self, transfer: Transfer) -> bool:
        keys = transfer.keys[len(transfer.keys) - len(transfer.blocks) :]
        return all(map(self._blocks.holds, transfer.blocks, keys))

    def end(self, transfer: Transfer, restored: int = 0) -> None:
        """Ends a transfer. Registers the `restored` blocks after the cached blocks, and releases all blocks."""
        start = transfer.found
        for key, block in zip(transfer.keys[start:], transfer.blocks[start : start + restored], strict=False):
            self._blocks.register(block, key)
        self._blocks.release(transfer.blocks)
        self._under_way -= 1
        self.ended += 1

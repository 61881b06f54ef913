"""Which KV blocks hold which tokens: a full block's key is a SHA-256 chain over model, KV type and tokens."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import sha256

from llamaclust.cluster.scheduler.kv_blocks import KvBlocks
from llamaclust.model.program import KV_BLOCK_TOKENS, KvType


class PrefixCache:
    """Finds and registers blocks by the tokens from position 0 to their end.

    `keys` is a list, one key a full block, that belongs to one sequence: it depends on its tokens alone and grows.
    """

    def __init__(self, blocks: KvBlocks, model_id: str, kv_type: KvType, enabled: bool = True) -> None:
        self.blocks = blocks
        self._root = sha256(f"{model_id}\0{kv_type}".encode()).digest()
        self._enabled = enabled

    def find(self, keys: list[bytes], tokens: Sequence[int], reusable: int) -> tuple[int, int]:
        """(found, idle): blocks of tokens[:reusable] that are cached from the beginning, and how many of them idle."""
        if not self._enabled:
            return 0, 0
        self._extend(keys, tokens, reusable // KV_BLOCK_TOKENS)
        found = idle = 0
        for key in keys[: reusable // KV_BLOCK_TOKENS]:
            is_idle = self.blocks.is_idle(key)
            if is_idle is None:
                break
            found += 1
            idle += is_idle
        return found, idle

    def register(
        self, keys: list[bytes], tokens: Sequence[int], table: Sequence[int], registered: int, full: int, start: int = 0
    ) -> None:
        """Registers blocks [registered, full), filled by the tokens, of a table that begins with block `start`."""
        if not self._enabled:
            return
        self._extend(keys, tokens, full)
        for index in range(registered, full):
            self.blocks.register(table[index - start], keys[index])

    def _extend(self, keys: list[bytes], tokens: Sequence[int], count: int) -> None:
        for index in range(len(keys), count):
            start = index * KV_BLOCK_TOKENS
            part = array("I", tokens[start : start + KV_BLOCK_TOKENS])
            keys.append(sha256((keys[-1] if keys else self._root) + part.tobytes()).digest())

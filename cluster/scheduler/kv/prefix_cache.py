"""A prefix cache with SHA-256 keys. A key covers model, KV type, adapters, salt, tokens and image rows."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from copy import copy
from hashlib import sha256
from struct import Struct

from llamaclust.cluster.scheduler.kv.blocks import KvBlocks
from llamaclust.cluster.scheduler.rows.image_spans import ImageSpan, SpanPlaces
from llamaclust.model.kv_type import KvType
from llamaclust.model.program import KV_BLOCK_TOKENS

_IMAGE = Struct("<5q")


class BlockKeys(list[bytes]):
    """The keys of a sequence's full blocks. Different salts, adapters or adapter scales give different keys."""

    def __init__(
        self, salt: str = "", adapters: Sequence[tuple[str, float]] = (), images: Sequence[ImageSpan] = ()
    ) -> None:
        """Takes `adapters` as (digest, scale) pairs, in the order in which workers apply them."""
        super().__init__()
        self._images, self._places = images, SpanPlaces(images)
        self.salt = f"{[*adapters]}\0{salt}" if adapters else f"\0{salt}"
        self._shared: list[bytes] = []  # The first keys, shared by all choices of an API request.
        self._most_shared = 0

    def shared(self, blocks: int) -> BlockKeys:
        """Returns keys for another sequence whose first `blocks` blocks have the same content."""
        self._most_shared = blocks
        self.share()
        other = copy(self)
        del other[len(self._shared) :]
        return other

    def share(self) -> None:
        self._shared += self[len(self._shared) : self._most_shared]

    def take_shared(self, count: int) -> None:
        self.extend(self._shared[len(self) : count])

    def images_of_block(self, start: int) -> bytes:
        numbers = self._places.within(start, start + KV_BLOCK_TOKENS)
        return b"".join(_part_of(self._images[number], start) for number in numbers)


class PrefixCache:
    """Finds cached KV blocks by their tokens. A block's key depends on all tokens up to the end of the block. Methods
    append missing keys to `keys`, so callers must pass the same list for the same sequence."""

    def __init__(self, blocks: KvBlocks, model_id: str, kv_type: KvType, enabled: bool = True) -> None:
        self.blocks = blocks
        self._root = f"{model_id}\0{kv_type}\0".encode()
        self.is_enabled = enabled

    def find(self, keys: BlockKeys, tokens: Sequence[int], reusable: int) -> tuple[int, int]:
        """Looks up the blocks of tokens[:reusable]. Returns the number of leading blocks that are cached, and how many
        of these are idle (used by no sequence)."""
        if not self.is_enabled:
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
        self, keys: BlockKeys, tokens: Sequence[int], table: Sequence[int], registered: int, full: int, start: int = 0
    ) -> None:
        """Registers a sequence's blocks with indices [registered, full). table[i - start] is the block with index i."""
        if not self.is_enabled:
            return
        self._extend(keys, tokens, full)
        for index in range(registered, full):
            self.blocks.register(table[index - start], keys[index])

    def _extend(self, keys: BlockKeys, tokens: Sequence[int], count: int) -> None:
        keys.take_shared(count)
        before = keys[-1] if keys else sha256(self._root + keys.salt.encode("utf-8", "surrogatepass")).digest()
        for index in range(len(keys), count):
            start = index * KV_BLOCK_TOKENS
            part = array("I", tokens[start : start + KV_BLOCK_TOKENS])
            before = sha256(before + part.tobytes() + keys.images_of_block(start)).digest()
            keys.append(before)
        keys.share()


def _part_of(span: ImageSpan, start: int) -> bytes:
    first, end = max(span.start, start), min(span.end, start + KV_BLOCK_TOKENS)
    place = first - start, end - start, span.offset + first - span.start, span.end - span.start
    return span.digest + _IMAGE.pack(*place, span.is_bidirectional)

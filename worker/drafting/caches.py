from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from llamaclust.core.drafts import DraftOrder
from llamaclust.model.program import KV_BLOCK_TOKENS


@dataclass(slots=True)
class SequenceCache:
    """The KV cache of one sequence: the sequence's tokens, followed by drafted tokens, which may be rejected."""

    tokens: list[int] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    settled: int = 0  # The first `settled` cached tokens are certainly not rejected drafts.

    def keep(self, tokens: Sequence[int], length: int) -> None:
        """Keeps the longest cached prefix of tokens[:length - 1]. The last token is computed again for its logits."""
        end = min(len(self.tokens), length - 1)
        place = min(self.settled, end)
        while place < end and self.tokens[place] == tokens[place]:
            place += 1
        self.settled = place
        del self.tokens[place:]

    @property
    def table(self) -> tuple[int, ...]:
        runs: list[int] = []
        for _, run in groupby(enumerate(self.blocks), key=lambda at: at[1] - at[0]):
            numbers = [block for _, block in run]
            runs += (numbers[0], len(numbers))
        return tuple(runs)


class SequenceCaches:
    def __init__(self, blocks: int) -> None:
        self._free = list(range(blocks - 1, -1, -1))
        self._caches: OrderedDict[int, SequenceCache] = OrderedDict()

    def of(self, order: DraftOrder, rows: int, kept: Collection[int]) -> SequenceCache | None:
        """Returns a cache for `rows` rows, or None if memory is short. May free caches of sequences not in `kept`."""
        cache = self._caches.setdefault(order.key, SequenceCache())
        self._caches.move_to_end(order.key)
        wanted = -(-rows // KV_BLOCK_TOKENS) - len(cache.blocks)
        if wanted > len(self._free) + sum(len(self._caches[key].blocks) for key in self._caches.keys() - set(kept)):
            return None
        for key in [key for key in self._caches if key not in kept]:
            if len(self._free) >= wanted:
                break
            self._free += self._caches.pop(key).blocks
        cache.blocks += [self._free.pop() for _ in range(wanted)]
        cache.keep(order.tokens, order.length)
        return cache

"""KV memory as the scheduler sees it: sequences get blocks, share those of equal beginnings, give them back."""

from __future__ import annotations

from llamaclust.cluster.kv_blocks import KvBlocks
from llamaclust.cluster.prefix_cache import PrefixCache
from llamaclust.cluster.sequences import Sequence
from llamaclust.cluster.settings import SchedulerSettings
from llamaclust.model.program import KV_BLOCK_TOKENS


class KvMemory:
    """The blocks of all stages and what they are known to hold."""

    def __init__(self, settings: SchedulerSettings) -> None:
        self.blocks = KvBlocks(settings.kv_blocks)
        self._cache = PrefixCache(self.blocks, settings.model_id, settings.kv_type, settings.prefix_cache)
        self._filling: set[bytes] = set()

    def begin_microbatch(self) -> None:
        """What was filled so far is there for those who come in this microbatch."""
        self._filling.clear()

    def admit(self, sequence: Sequence, reserve: int) -> bool:
        """Gives a sequence blocks for all rows to compute, cached ones first, if that leaves `reserve` blocks.

        It waits as well where the microbatch that is being made fills blocks that it could share: rows of one
        microbatch must not count on each other's.
        """
        found, idle = self._cache.find(sequence.chain, sequence.tokens, sequence.first_output)
        fresh = sequence.blocks_needed - found
        if fresh + idle + reserve > self.blocks.available:
            return False
        if self._filling and not self._filling.isdisjoint(sequence.chain[:found]):
            return False
        for key in sequence.chain[:found]:
            sequence.table.append(self.blocks.hold(key))
        for _ in range(fresh):
            sequence.table.append(self.blocks.take())
        sequence.rewind(found * KV_BLOCK_TOKENS)
        return True

    def grow(self, sequence: Sequence) -> bool:
        """Gives a sequence the block for its next row; False where none is left."""
        if len(sequence.table) < sequence.blocks_needed:
            if not self.blocks.available:
                return False
            sequence.table.append(self.blocks.take())
        return True

    def filled(self, sequence: Sequence) -> None:
        """Rows up to `scheduled` are in the microbatch that is being made: later ones may share full blocks of known
        tokens."""
        full = min(sequence.scheduled, len(sequence.tokens)) // KV_BLOCK_TOKENS
        if full > sequence.labelled:
            self._cache.label(sequence.chain, sequence.tokens, sequence.table.blocks, sequence.labelled, full)
            self._filling.update(sequence.chain[sequence.labelled : full])
            sequence.labelled = full

    def release(self, sequence: Sequence) -> None:
        """Takes all blocks from a sequence."""
        self.blocks.release(sequence.table.clear())
        sequence.rewind(0)

from __future__ import annotations

from dataclasses import dataclass, fields, replace


@dataclass(frozen=True, slots=True)
class Counts:
    running: int
    waiting: int
    in_flight: int
    kv_blocks: int
    kv_blocks_held: int
    preemptions: int
    retries: int  # Number of times that a sequence was computed again because a row had no result.
    cached_tokens: int  # Total prompt tokens found in the prefix cache.
    # Total prompt tokens computed. Tokens that are computed again after a preemption count again.
    computed_tokens: int

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(getattr(self, each.name) + getattr(other, each.name) for each in fields(self)))

    @property
    def totals(self) -> Counts:
        """The counts after the scheduler has ended. Counters keep their values, and gauges become 0."""
        return replace(self, running=0, waiting=0, in_flight=0, kv_blocks=0, kv_blocks_held=0)

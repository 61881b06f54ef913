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
    retries: int  # sequences computed again because a row had no answer
    cached_tokens: int  # prompt tokens found in the prefix cache, in all
    computed_tokens: int  # prompt tokens computed, in all; those computed again after a preemption count again

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(getattr(self, each.name) + getattr(other, each.name) for each in fields(self)))

    @property
    def totals(self) -> Counts:
        """A copy for a scheduler that has ended. Gauges are 0, and counters keep their values."""
        return replace(self, running=0, waiting=0, in_flight=0, kv_blocks=0, kv_blocks_held=0)

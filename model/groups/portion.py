from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Portion:
    """The part of a stage that one member of a group computes: the shares of all members, and the member's number."""

    shares: tuple[int, ...]
    member: int

    @property
    def leads(self) -> bool:
        return self.member == 0

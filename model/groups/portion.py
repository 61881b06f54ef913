"""The portion of a stage that one member of a group computes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Portion:
    """The shares of all members in the output rows, and the number of the member with this portion."""

    shares: tuple[int, ...]
    member: int

    @property
    def leads(self) -> bool:
        return self.member == 0

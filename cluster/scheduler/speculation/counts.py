"""How many tokens were drafted, and how many of them were right."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DraftCounts:
    """Of drafts whose rows were computed."""

    drafts: int = 0
    drafted: int = 0  # tokens of these
    accepted: int = 0  # of the tokens, those that are in the answer

    def __add__(self, other: DraftCounts) -> DraftCounts:
        return DraftCounts(self.drafts + other.drafts, self.drafted + other.drafted, self.accepted + other.accepted)

    def __sub__(self, other: DraftCounts) -> DraftCounts:
        return DraftCounts(self.drafts - other.drafts, self.drafted - other.drafted, self.accepted - other.accepted)

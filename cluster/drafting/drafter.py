"""What every drafter does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

CLASSES = 8
"""Of confidence."""


@dataclass(frozen=True, slots=True)
class Draft:
    """Tokens that may follow. Drafts of one class of confidence, 0 to CLASSES - 1, are accepted about as often."""

    tokens: tuple[int, ...]
    confidence: int


NO_DRAFT = Draft((), 0)


class Drafter(Protocol):
    """Of one sequence."""

    def draft(self, tokens: Sequence[int], most: int) -> Draft:
        """Up to `most` tokens that may follow; `tokens`, prompt and answer, only ever grow between calls."""


class Drafters(Protocol):
    """Makes a drafter for each sequence. Sequences of one group may learn from each other, and from no others."""

    def of(self, group: str) -> Drafter: ...

    def ended(self, group: str, tokens: Sequence[int]) -> None:
        """A sequence has its whole answer."""

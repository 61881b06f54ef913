"""The interface of drafters. A draft changes how fast an answer is computed, never which tokens it has."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Protocol

CLASSES = 20
"""Of confidence."""
SUBSTITUTED = 1
"""A match of 8 tokens or more went on behind one that differs from the sequence's last one."""
SHORT = 2
"""A match of 2 or 3 tokens; three classes: other tokens followed elsewhere, it is the only one, one token followed."""
MIDDLE = 5
"""Of 4 to 7; likewise three classes."""
LONG = 8
"""Of 8 to 15, and of more."""
SHARED = 10
"""In answers to other requests: of less than 16, and of more."""
MODEL = 12
"""Of a draft model."""
FORCED = 13
"""By a grammar."""
MTP = 14
"""Of an MTP head."""
RESUMED = 15
"""A copy that goes on a few tokens behind a difference; two classes: the last token alone is near there, or several."""
SINGLE = 17
"""A match of the last token alone; three classes as of `SHORT`."""


def kind_of(confidence: int) -> str:
    """What drafts of a class are made by."""
    by = {MODEL: "model", FORCED: "forced", MTP: "mtp", SHARED: "shared", SHARED + 1: "shared"}
    return by.get(confidence, "ngram")


@dataclass(frozen=True, slots=True)
class Draft:
    """Tokens that may follow."""

    tokens: tuple[int, ...]
    confidence: int
    """Its class, in [0, CLASSES): drafts of one class are accepted about as often."""
    forced: int = 0
    """How many of the first tokens are those that a grammar forces: these are of class FORCED."""

    def confidence_at(self, place: int) -> int:
        """Of the token there."""
        return FORCED if place < self.forced else self.confidence


NO_DRAFT = Draft((), 0)


class Drafter(Protocol):
    """Of one sequence."""

    def draft(self, tokens: Sequence[int], most: int) -> Draft:
        """Up to `most` tokens that may follow `tokens`: prompt and answer, which only ever grow between calls."""


class Drafters(Protocol):
    """Makes a drafter for each sequence."""

    def of(self, key: Hashable) -> Drafter:
        """`key`: sequences with another one share nothing with it (cache salt and adapters)."""

    def ended(self, key: Hashable, tokens: Sequence[int]) -> None:
        """A sequence has its whole answer."""

"""The interface of drafters. A draft changes how fast an answer is computed, but never the answer's tokens."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Protocol

CLASSES = 20
"""The number of confidence classes. Drafts of one class have about the same acceptance rate."""
SUBSTITUTED = 1
"""The confidence class of drafts after a token that differs from a copied text, if the 8 tokens before it match."""
SHORT = 2
"""The first of 3 classes for matches of 2 or 3 tokens. The first class is for matches with different next tokens, the
second is for a single match, and the third is for several matches with the same next token."""
MIDDLE = 5
"""The first of 3 classes for matches of 4 to 7 tokens. They are divided like the classes of `SHORT`."""
LONG = 8
"""The first of 2 classes for long matches: 8 to 15 tokens, and 16 tokens or more."""
SHARED = 10
"""The first of 2 classes for drafts from other requests' answers: matches of up to 15 tokens, and of 16 or more."""
MODEL = 12
FORCED = 13
MTP = 14
RESUMED = 15
"""The first of 2 classes for copies that resume after a difference: one token matches there, or several match."""
SINGLE = 17
"""The first of 3 classes for matches of the last token alone. They are divided like the classes of `SHORT`."""


def kind_of(confidence: int) -> str:
    by = {MODEL: "model", FORCED: "forced", MTP: "mtp", SHARED: "shared", SHARED + 1: "shared"}
    return by.get(confidence, "ngram")


@dataclass(frozen=True, slots=True)
class Draft:
    tokens: tuple[int, ...]
    confidence: int
    forced: int = 0
    """The number of leading tokens that a grammar forces. Forced tokens have the class `FORCED`."""

    def confidence_at(self, place: int) -> int:
        return FORCED if place < self.forced else self.confidence


NO_DRAFT = Draft((), 0)


class Drafter(Protocol):
    def draft(self, tokens: Sequence[int], most: int) -> Draft:
        """Returns a draft of at most `most` tokens. `tokens` (prompt and answer) may only grow between calls."""


class Drafters(Protocol):
    def of(self, key: Hashable) -> Drafter:
        """Returns a drafter. Drafters with different keys (cache salt and adapters) share nothing."""

    def ended(self, key: Hashable, tokens: Sequence[int]) -> None:
        """Takes a sequence's complete answer when the sequence ends."""

"""The interface of drafters. A draft changes how fast an answer is computed, but never its tokens."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Protocol

CLASSES = 20
"""The number of confidence classes. Drafts of one class have about the same acceptance rate."""
SUBSTITUTED = 1
"""The class of drafts after a replaced token whose 8 previous tokens match."""
SHORT = 2
"""The first of 3 classes after matches of 2 or 3 tokens: several tokens followed such matches, there was one match, or
one token followed all of them."""
MIDDLE = 5
"""The first of 3 classes after matches of 4 to 7 tokens, distinguished like those of `SHORT`."""
LONG = 8
"""The first of 2 classes: after matches of 8 to 15 tokens, and of more tokens."""
SHARED = 10
"""The first of 2 classes for drafts from other requests' answers: after matches of fewer than 16 tokens, or more."""
MODEL = 12
FORCED = 13
MTP = 14
RESUMED = 15
"""The first of 2 classes at which a copy resumes after a difference: one token matches there, or several."""
SINGLE = 17
"""The first of 3 classes after a match of only the last token, distinguished like those of `SHORT`."""


def kind_of(confidence: int) -> str:
    by = {MODEL: "model", FORCED: "forced", MTP: "mtp", SHARED: "shared", SHARED + 1: "shared"}
    return by.get(confidence, "ngram")


@dataclass(frozen=True, slots=True)
class Draft:
    tokens: tuple[int, ...]
    confidence: int
    forced: int = 0
    """The number of tokens at the beginning that a grammar forces. Their class is FORCED."""

    def confidence_at(self, place: int) -> int:
        return FORCED if place < self.forced else self.confidence


NO_DRAFT = Draft((), 0)


class Drafter(Protocol):
    def draft(self, tokens: Sequence[int], most: int) -> Draft:
        """Returns a draft of up to `most` tokens. `tokens`, prompt and answer, only grow between calls."""


class Drafters(Protocol):
    def of(self, key: Hashable) -> Drafter:
        """Returns a drafter, which shares nothing with sequences of another `key` (cache salt and adapters)."""

    def ended(self, key: Hashable, tokens: Sequence[int]) -> None:
        """Takes the whole answer of a sequence."""

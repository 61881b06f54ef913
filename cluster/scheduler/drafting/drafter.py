"""The interface of drafters. A draft changes how fast an answer is computed, never which tokens it has."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Protocol

CLASSES = 20
"""The number of classes of confidence."""
SUBSTITUTED = 1
"""The class of drafts behind a replaced token, with the same 8 tokens or more before it."""
SHORT = 2
"""Classes of matches of 2 or 3 tokens: other tokens followed elsewhere, one match, one token followed all."""
MIDDLE = 5
"""Classes of matches of 4 to 7 tokens, three as from `SHORT`."""
LONG = 8
"""Classes of matches of 8 to 15 tokens, and of more."""
SHARED = 10
"""Classes of matches in answers to other requests: of fewer than 16 tokens, and of more."""
MODEL = 12
FORCED = 13
MTP = 14
RESUMED = 15
"""Classes of copies behind a few tokens that differ: the last token alone is near there, or several are."""
SINGLE = 17
"""Classes of matches of the last token alone, three as from `SHORT`."""


def kind_of(confidence: int) -> str:
    by = {MODEL: "model", FORCED: "forced", MTP: "mtp", SHARED: "shared", SHARED + 1: "shared"}
    return by.get(confidence, "ngram")


@dataclass(frozen=True, slots=True)
class Draft:
    tokens: tuple[int, ...]
    confidence: int
    """The class, in [0, CLASSES): drafts of one class are accepted about as often."""
    forced: int = 0
    """The number of first tokens that a grammar forces, which are of class FORCED."""

    def confidence_at(self, place: int) -> int:
        return FORCED if place < self.forced else self.confidence


NO_DRAFT = Draft((), 0)


class Drafter(Protocol):
    def draft(self, tokens: Sequence[int], most: int) -> Draft:
        """Returns up to `most` tokens that may follow `tokens` (prompt and answer), which only grow between calls."""


class Drafters(Protocol):
    def of(self, key: Hashable) -> Drafter:
        """Returns a drafter. Sequences with another `key` (cache salt and adapters) share nothing with it."""

    def ended(self, key: Hashable, tokens: Sequence[int]) -> None:
        """Takes in a sequence's whole answer."""

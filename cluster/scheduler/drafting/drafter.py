"""Interface of drafters. A draft can make an answer faster, but it never changes the answer's tokens."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Protocol

CLASSES = 20
"""Number of confidence classes. Drafts of one class are accepted at about the same rate."""
SUBSTITUTED = 1
"""Confidence class of drafts if the last token differs from the copied passage, but the 8 tokens before it match."""
SHORT = 2
"""First of 3 confidence classes for matches of 2 or 3 tokens. The classes are for three cases: several matches with
different next tokens, a single match, and several matches with the same next token."""
MIDDLE = 5
"""First of 3 confidence classes for matches of 4 to 7 tokens, in the same three cases as `SHORT`."""
LONG = 8
"""First of 2 confidence classes for long matches: 8 to 15 tokens, and 16 tokens or more."""
SHARED = 10
"""First of 2 confidence classes for matches in answers to other requests: up to 15 tokens, and 16 or more."""
MODEL = 12
FORCED = 13
MTP = 14
RESUMED = 15
"""First of 2 confidence classes for copies that resume after a difference: one matching token, and several."""
SINGLE = 17
"""First of 3 confidence classes for matches of the last token only, in the same three cases as `SHORT`."""


def kind_of(confidence: int) -> str:
    by = {MODEL: "model", FORCED: "forced", MTP: "mtp", SHARED: "shared", SHARED + 1: "shared"}
    return by.get(confidence, "ngram")


@dataclass(frozen=True, slots=True)
class Draft:
    tokens: tuple[int, ...]
    confidence: int
    forced: int = 0
    """Number of tokens at the start of the draft that a grammar forces. Their confidence class is `FORCED`."""

    def confidence_at(self, place: int) -> int:
        return FORCED if place < self.forced else self.confidence


NO_DRAFT = Draft((), 0)


class Drafter(Protocol):
    def draft(self, tokens: Sequence[int], most: int) -> Draft:
        """Returns a draft of up to `most` tokens. `tokens` (prompt and answer) may only grow between calls."""


class Drafters(Protocol):
    def of(self, key: Hashable) -> Drafter:
        """Returns a new drafter. Drafters with different keys (cache salt and adapters) share no tokens."""

    def ended(self, key: Hashable, tokens: Sequence[int]) -> None: ...

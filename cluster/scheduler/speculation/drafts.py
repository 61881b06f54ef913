"""Drafts of one sequence, which are compared with the tokens that follow."""

from __future__ import annotations

from collections.abc import Sequence

from llamaclust.cluster.scheduler.drafting.drafter import CLASSES, FORCED, MODEL, MTP, NO_DRAFT, Draft, Drafter, kind_of
from llamaclust.cluster.scheduler.speculation.acceptance import Acceptance
from llamaclust.cluster.scheduler.speculation.candidates import LONGEST_DRAFT, Candidate, Chain

_PRIORS = (0.3, 0.2, 0.2, 0.3, 0.7, 0.4, 0.6, 0.9, 0.85, 0.95, 0.6, 0.9, 0.7, 0.99, 0.7, 0.6, 0.8, 0.14, 0.25, 0.65)
"""Assumed acceptance rate of each confidence class before any token was compared (benchmarks/notebook.md)."""


class SequenceDrafts:
    def __init__(self, drafter: Drafter, vocabulary: int, common: Sequence[Acceptance]) -> None:
        self._drafter = drafter
        self._vocabulary = vocabulary
        self._common = common
        self._own = [Acceptance() for _ in common]
        self._draft = NO_DRAFT
        self._at = 0  # Number of tokens before the draft.
        self._seen = 0  # Number of tokens that were compared with a draft.
        self.chain: Chain | None = None  # Windows that are sent without waiting for each other's results.
        self._offered = 0  # Number of tokens before the draft model's last draft.

    def next(self, tokens: Sequence[int], most: int, forced: tuple[int, ...] = ()) -> Candidate:
        """Returns a draft of up to `most` tokens after `tokens`. It begins with `forced`, which a grammar requires."""
        self._compare(tokens)
        if not (self._at == len(tokens) and self._draft.tokens):
            self._draft, self._at = (
                self._checked(_obeying(self._drafter.draft(tokens, LONGEST_DRAFT), forced), LONGEST_DRAFT),
                len(tokens),
            )
        draft, rate = self._draft, self.rate(self._draft.confidence)
        return Candidate(draft.tokens[:most], rate, min(draft.forced, most), self.rate(FORCED) if draft.forced else 1.0)

    def further(self, tokens: Sequence[int], ahead: tuple[int, ...], most: int) -> tuple[int, ...]:
        """Returns up to `most` drafted tokens after those in flight (`ahead`), or () if `ahead` is not in the draft."""
        self._compare(tokens)
        under_way = (*tokens[self._at :], *ahead)
        if self._draft.tokens[: len(under_way)] != under_way:
            return ()
        return self._draft.tokens[len(under_way) : len(under_way) + most]

    @property
    def length(self) -> int:
        return len(self._draft.tokens)

    @property
    def current_rate(self) -> float:
        return self.rate(self._draft.confidence)

    def rate(self, confidence: int) -> float:
        return self._own[confidence].rate(self._common[confidence].rate(_PRIORS[confidence]))

    def offer(self, tokens: Sequence[int], length: int, drafted: tuple[int, ...]) -> None:
        """Takes the draft model's draft, which begins at index `length`. Ignores it if `tokens` has grown since."""
        self._compare(tokens)
        if length == len(tokens):
            self._offered = length
            if drafted:
                self._draft, self._at = self._checked(Draft(drafted, MODEL), len(drafted)), length

    def suggest(self, tokens: Sequence[int], drafted: tuple[int, ...]) -> None:
        """Uses an MTP head's draft if it promises more accepted tokens than the drafter's own draft."""
        own = self.next(tokens, LONGEST_DRAFT)
        draft = self._checked(Draft(drafted, MTP), len(drafted))
        if expected(self.rate(MTP), len(draft.tokens)) > expected(own.rate, len(own.tokens)):
            self._draft, self._at = draft, len(tokens)

    @property
    def kind(self) -> str:
        return kind_of(self._draft.confidence_at(0))

    @property
    def is_of_mtp(self) -> bool:
        return self._draft.confidence == MTP

    def has_offer(self, tokens: Sequence[int]) -> bool:
        return self._offered == len(tokens)

    def _checked(self, draft: Draft, most: int) -> Draft:
        tokens = draft.tokens[:most]
        wrong = next((place for place, token in enumerate(tokens) if not 0 <= token < self._vocabulary), most)
        return Draft(tokens[:wrong], min(max(draft.confidence, 0), CLASSES - 1), min(draft.forced, wrong))

    def _compare(self, tokens: Sequence[int]) -> None:
        for place in range(self._seen, min(len(tokens), self._at + len(self._draft.tokens))):
            is_accepted = tokens[place] == self._draft.tokens[place - self._at]
            confidence = self._draft.confidence_at(place - self._at)
            self._own[confidence].learn(is_accepted=is_accepted)
            self._common[confidence].learn(is_accepted=is_accepted)
            if not is_accepted:
                self._draft = NO_DRAFT
                break
        self._seen = max(self._seen, len(tokens))


def _obeying(draft: Draft, forced: tuple[int, ...]) -> Draft:
    tokens = draft.tokens if draft.tokens[: len(forced)] == forced else forced
    return Draft(tokens, draft.confidence, len(forced))


def expected(rate: float, count: int) -> float:
    return sum(rate**depth for depth in range(1, count + 1))

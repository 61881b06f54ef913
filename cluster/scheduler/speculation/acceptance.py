"""How many drafted tokens turn out to be the ones that are chosen, learned from recent ones. Pure."""

from __future__ import annotations

_REMEMBERED = 48
"""Tokens, about: of earlier ones little is left."""
_PRIOR_TOKENS = 3
"""What is known in advance counts as so many."""
_STREAK = 2
"""From so many tokens in a row on, that says more than the mean: text changes from one token to the next."""


class Acceptance:
    """Of drafts of one kind."""

    __slots__ = ("_accepted", "_streak", "_tried")

    def __init__(self) -> None:
        self._tried = self._accepted = 0.0
        self._streak = 0  # tokens since the last one that went the other way; negative: refused ones

    def learn(self, *, is_accepted: bool) -> None:
        """Of a token before which all drafted ones were right."""
        kept = 1 - 1 / _REMEMBERED
        self._tried = self._tried * kept + 1
        self._accepted = self._accepted * kept + is_accepted
        if is_accepted:
            self._streak = max(self._streak, 0) + 1
        else:
            self._streak = min(self._streak, 0) - 1

    def rate(self, prior: float) -> float:
        """The probability that the next one is accepted. `prior`: what it is taken for without experience."""
        mean = (self._accepted + _PRIOR_TOKENS * prior) / (self._tried + _PRIOR_TOKENS)
        if self._streak >= _STREAK:
            return max(mean, (self._streak + 1) / (self._streak + 2))
        if self._streak <= -_STREAK:
            return min(mean, 1 / (2 - self._streak))
        return mean

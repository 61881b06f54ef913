"""How many drafted tokens turn out to be the ones that are chosen, learned from recent ones. Pure."""

from __future__ import annotations

_REMEMBERED = 96
"""Tokens, about: of earlier ones little is left."""
_PRIOR_TOKENS = 3
"""What is known in advance counts as so many."""
_CHANGES = 1 / 128
"""How probable it is at each token that what is said is of another kind from there on."""


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
        streak = abs(self._streak)
        if self._streak >= 0:
            return _weighed(mean**streak, mean, streak, (streak + 1) / (streak + 2))
        return _weighed((1 - mean) ** streak, mean, streak, 1 / (streak + 2))


def _weighed(as_before: float, mean: float, streak: int, since: float) -> float:
    """The mean of before, whose probability to bring such a streak is given, and that of the streak alone, which has
    probability 1 / (streak + 1) where any rate is as probable as any other."""
    changed = _CHANGES * streak / (streak + 1)
    return (as_before * mean + changed * since) / (as_before + changed) if changed else mean

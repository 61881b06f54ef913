"""How many drafted tokens turn out to be the ones that are chosen, learned from recent ones. Pure."""

from __future__ import annotations

_REMEMBERED = 96
"""Tokens, about: of earlier ones little is left."""
_PRIOR_TOKENS = 3
"""What is known in advance counts as so many."""
_CHANGES = 1 / 256
"""How probable it is at each token that what is said is of another kind from there on."""
_STRETCHES = 6
"""That are looked at, at most."""
_EVEN = 1.0
"""Tokens of either kind that count behind a change: any rate is as probable as any other."""


class _Stretch:
    """Tokens since a possible change."""

    __slots__ = ("accepted", "tried", "weight")

    def __init__(self, weight: float) -> None:
        self.weight = weight  # how probable it is that all of these tokens, and no earlier ones, are of one kind
        self.tried = self.accepted = 0.0

    @property
    def rate(self) -> float:
        return (self.accepted + _EVEN) / (self.tried + 2 * _EVEN)

    def learn(self, is_accepted: bool) -> float:
        """Its new weight."""
        rate = (self.accepted + _EVEN) / (self.tried + 2 * _EVEN)
        self.weight *= rate if is_accepted else 1 - rate
        self.tried += 1 - self.tried / _REMEMBERED
        self.accepted += is_accepted - self.accepted / _REMEMBERED
        return self.weight


class Acceptance:
    """Of drafts of one kind. Since when they have been of this kind is not known: the mean over the stretches that may
    have begun with a change, by how probable the tokens since then make each of them."""

    __slots__ = ("_first", "_rate", "_stretches")

    def __init__(self) -> None:
        self._rate: tuple[float, float] | None = None  # prior and rate of the last question since it learned
        self._first: _Stretch | None = _Stretch(1.0)  # without a change; None: there was one, as good as certain
        self._stretches = [self._first]

    def learn(self, *, is_accepted: bool) -> None:
        """Of a token before which all drafted ones were right."""
        self._rate = None
        stretches = self._stretches
        unchanged = (1 - _CHANGES) / sum([stretch.learn(is_accepted) for stretch in stretches])
        for stretch in stretches:
            stretch.weight *= unchanged
        if len(stretches) == _STRETCHES:
            least = min(stretches, key=lambda stretch: stretch.weight)
            stretches.remove(least)
            if least is self._first:
                self._first = None
        stretches.append(_Stretch(_CHANGES))

    def rate(self, prior: float) -> float:
        """The probability that the next one is accepted. `prior`: what it is taken for without experience."""
        if self._rate is not None and self._rate[0] == prior:
            return self._rate[1]
        total = weighed = 0.0
        for stretch in self._stretches:
            rate = stretch.rate
            if stretch is self._first:
                rate = (stretch.accepted + _PRIOR_TOKENS * prior) / (stretch.tried + _PRIOR_TOKENS)
            total += stretch.weight
            weighed += stretch.weight * rate
        self._rate = prior, weighed / total
        return self._rate[1]

from __future__ import annotations

_REMEMBERED = 96
_PRIOR_TOKENS = 3
_CHANGES = 1 / 256
"""Probability per token that the kind of text changes, which changes the acceptance rate."""
_STRETCHES = 6
_EVEN = 1.0
"""Number of accepted and of rejected tokens assumed at the start."""


class _Stretch:
    __slots__ = ("accepted", "tried", "weight")

    def __init__(self, weight: float) -> None:
        self.weight = weight  # Probability that the current kind of text began with this stretch.
        self.tried = self.accepted = 0.0

    @property
    def rate(self) -> float:
        return (self.accepted + _EVEN) / (self.tried + 2 * _EVEN)

    def learn(self, is_accepted: bool) -> float:
        rate = (self.accepted + _EVEN) / (self.tried + 2 * _EVEN)
        self.weight *= rate if is_accepted else 1 - rate
        self.tried += 1 - self.tried / _REMEMBERED
        self.accepted += is_accepted - self.accepted / _REMEMBERED
        return self.weight


class Acceptance:
    """Estimates the acceptance rate for one kind of draft. The rate may change with the kind of text."""

    __slots__ = ("_first", "_rate", "_stretches")

    def __init__(self) -> None:
        # Prior and result of the last call of `rate`. None: `learn` was called since.
        self._rate: tuple[float, float] | None = None
        # Stretch from the first token. None: the text has almost certainly changed since.
        self._first: _Stretch | None = _Stretch(1.0)
        self._stretches = [self._first]

    def learn(self, *, is_accepted: bool) -> None:
        """Records whether a drafted token was accepted. All drafted tokens before it must have been accepted."""
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
        """Returns the probability that the next token is accepted. `prior` is the assumed rate without samples."""
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

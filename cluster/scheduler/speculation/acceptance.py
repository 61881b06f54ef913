from __future__ import annotations

_REMEMBERED = 96
_PRIOR_TOKENS = 3
_CHANGES = 1 / 256
"""Probability per token that the kind of text changes, which changes the acceptance rate."""
_SEGMENTS = 6
_PRIOR_COUNT = 1.0
"""Number of accepted and of rejected tokens assumed at the start."""


class _TextSegment:
    __slots__ = ("accepted", "tried", "weight")

    def __init__(self, weight: float) -> None:
        self.weight = weight  # Probability that the current kind of text began with this segment.
        self.tried = self.accepted = 0.0

    @property
    def rate(self) -> float:
        return (self.accepted + _PRIOR_COUNT) / (self.tried + 2 * _PRIOR_COUNT)

    def learn(self, is_accepted: bool) -> float:
        rate = (self.accepted + _PRIOR_COUNT) / (self.tried + 2 * _PRIOR_COUNT)
        self.weight *= rate if is_accepted else 1 - rate
        self.tried += 1 - self.tried / _REMEMBERED
        self.accepted += is_accepted - self.accepted / _REMEMBERED
        return self.weight


class Acceptance:
    """Estimates the acceptance rate for one kind of draft. The rate may change with the kind of text."""

    __slots__ = ("_first", "_rate", "_segments")

    def __init__(self) -> None:
        # Prior and result of the last call of `rate`. None: `learn` was called since.
        self._rate: tuple[float, float] | None = None
        # Segment from the first token. None: the text has almost certainly changed since.
        self._first: _TextSegment | None = _TextSegment(1.0)
        self._segments = [self._first]

    def learn(self, *, is_accepted: bool) -> None:
        """Records whether a drafted token was accepted. All drafted tokens before it must have been accepted."""
        self._rate = None
        segments = self._segments
        unchanged = (1 - _CHANGES) / sum([segment.learn(is_accepted) for segment in segments])
        for segment in segments:
            segment.weight *= unchanged
        if len(segments) == _SEGMENTS:
            least = min(segments, key=lambda segment: segment.weight)
            segments.remove(least)
            if least is self._first:
                self._first = None
        segments.append(_TextSegment(_CHANGES))

    def rate(self, prior: float) -> float:
        """Returns the probability that the next token is accepted. `prior` is the assumed rate without samples."""
        if self._rate is not None and self._rate[0] == prior:
            return self._rate[1]
        total = weighed = 0.0
        for segment in self._segments:
            rate = segment.rate
            if segment is self._first:
                rate = (segment.accepted + _PRIOR_TOKENS * prior) / (segment.tried + _PRIOR_TOKENS)
            total += segment.weight
            weighed += segment.weight * rate
        self._rate = prior, weighed / total
        return self._rate[1]

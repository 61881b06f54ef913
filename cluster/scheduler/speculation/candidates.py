"""Drafts to choose from: one window (tokens of a draft that are computed in one step), or a chain of windows."""

from __future__ import annotations

from dataclasses import dataclass

MAX_WINDOW = 32
LONGEST_DRAFT = 4 * MAX_WINDOW
"""The most tokens of a draft, of which several windows may be in flight."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A sequence's draft. `rate`: the probability that a token is accepted if all tokens before it were."""

    tokens: tuple[int, ...] = ()
    rate: float = 0.0
    forced: int = 0  # the number of first tokens that a grammar forces
    forced_rate: float = 1.0  # acceptance of forced tokens

    def gain(self, depth: int) -> float:
        forced = min(depth, self.forced)
        return self.forced_rate**forced * self.rate ** (depth - forced)

    @property
    def most_gain(self) -> float:
        """An upper bound of the expected number of accepted tokens of a draft with these rates, however long it is."""
        others = self.rate / (1 - min(self.rate, 0.999)) if len(self.tokens) > self.forced else 0.0
        return self.forced + others


@dataclass(frozen=True, slots=True)
class Chain:
    """Windows of one sequence in flight together. Each continues the drafted tokens of the window before it."""

    window: int  # drafted tokens of each
    depth: int  # windows under way, at most
    rate: float  # acceptance of a token
    speed: float  # expected tokens a nanosecond, less the margin

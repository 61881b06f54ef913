"""Drafts to choose from. A window is the part of a draft that one step computes. A chain is a series of windows."""

from __future__ import annotations

from dataclasses import dataclass

MAX_WINDOW = 32
LONGEST_DRAFT = 4 * MAX_WINDOW
"""The most tokens of a draft. Several windows of a draft may be in flight."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A sequence's draft. `rate` is the probability that a token is accepted if all tokens before it were accepted."""

    tokens: tuple[int, ...] = ()
    rate: float = 0.0
    forced: int = 0  # the number of first tokens that a grammar forces
    forced_rate: float = 1.0  # acceptance of forced tokens

    def gain(self, depth: int) -> float:
        forced = min(depth, self.forced)
        return self.forced_rate**forced * self.rate ** (depth - forced)

    @property
    def most_gain(self) -> float:
        """An upper bound for the expected number of accepted tokens of a draft of any length with these rates."""
        others = self.rate / (1 - min(self.rate, 0.999)) if len(self.tokens) > self.forced else 0.0
        return self.forced + others


@dataclass(frozen=True, slots=True)
class Chain:
    """Windows of one sequence that are in flight together. Each window continues the draft after the window before."""

    window: int  # drafted tokens of each
    depth: int  # windows under way, at most
    rate: float  # acceptance of a token
    speed: float  # expected tokens a nanosecond, less the margin

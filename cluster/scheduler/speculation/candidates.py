"""Drafts to choose from. A window is the part of a draft that one step computes. A chain is a series of windows."""

from __future__ import annotations

from dataclasses import dataclass

MAX_WINDOW = 32
LONGEST_DRAFT = 4 * MAX_WINDOW
"""Maximum length of a draft in tokens. One step computes only a part of a long draft, which is called a window."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A draft to choose from. `rate` is the probability that a token is accepted if all before it were accepted."""

    tokens: tuple[int, ...] = ()
    rate: float = 0.0
    forced: int = 0  # Number of tokens at the start that a grammar forces.
    forced_rate: float = 1.0  # Probability that a forced token is accepted.

    def gain(self, depth: int) -> float:
        forced = min(depth, self.forced)
        return self.forced_rate**forced * self.rate ** (depth - forced)

    @property
    def most_gain(self) -> float:
        """Upper bound of the expected number of accepted tokens, for a draft of any length with these rates."""
        others = self.rate / (1 - min(self.rate, 0.999)) if len(self.tokens) > self.forced else 0.0
        return self.forced + others


@dataclass(frozen=True, slots=True)
class Chain:
    """Windows of one sequence's draft that are in flight together. Each window continues the window before it."""

    window: int  # Number of drafted tokens in each window.
    depth: int  # Maximum number of windows in flight.
    rate: float  # Probability that a token is accepted.
    speed: float  # Expected tokens per nanosecond, reduced by the margin.

"""Steps of which another device, or another member of a group, computes a part."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from llamaclust.model.steps.step import Buffer, StepFacts


@dataclass(frozen=True, slots=True)
class Exchange(StepFacts):
    """out[r] = what another device computes of row r of `inputs`: experts that lie there, say. Of a program that is
    divided by kinds of tensors."""

    inputs: tuple[Buffer, ...]
    out: Buffer

    @property
    def reads(self) -> tuple[Buffer, ...]:
        return self.inputs


@dataclass(frozen=True, slots=True)
class Gather(StepFacts):
    """Puts rows together, of which each member of a group has computed a portion: out = the columns of all members;
    this one's are `x`. A row of either is `lines` of equal width; member i has columns [borders[i], borders[i + 1]) of
    each line of out, and no `x` where these are none.

    With `to`, that member alone gets the whole rows; nothing at the others reads them.
    """

    x: Buffer | None
    out: Buffer
    borders: tuple[int, ...]
    to: int | None = None
    lines: int = 1

    @property
    def reads(self) -> tuple[Buffer, ...]:
        return () if self.x is None else (self.x,)

    @property
    def is_of_one(self) -> bool:
        """True where one member has all columns, which it sends to the others."""
        return self.borders[-1] in (end - begin for begin, end in pairwise(self.borders))

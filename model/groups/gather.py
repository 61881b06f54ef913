"""The step at which the members of a group put a row together, of which each has computed a portion."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from llamaclust.model.row_steps import Buffer


@dataclass(frozen=True, slots=True)
class Gather:
    """out = the columns of all members; this one's are `x`. A row of either is `lines` of equal width; member i has
    columns [borders[i], borders[i + 1]) of each line of out, and no `x` where these are none.

    With `to`, that member alone gets the whole rows; nothing at the others reads them.
    """

    x: Buffer | None
    out: Buffer
    borders: tuple[int, ...]
    to: int | None = None
    lines: int = 1

    @property
    def is_of_one(self) -> bool:
        """True where one member has all columns, which it sends to the others."""
        return self.borders[-1] in (end - begin for begin, end in pairwise(self.borders))

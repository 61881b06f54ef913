"""Where the members of a group put a row together that each of them has computed a portion of."""

from __future__ import annotations

from dataclasses import dataclass

from llamaclust.model.row_steps import Buffer


@dataclass(frozen=True, slots=True)
class Gather:
    """out = the columns of all members; this one's are `x`. A row of either is `lines` of equal width; member i has
    columns [borders[i], borders[i + 1]) of each line of out.

    With `to`, that member alone gets the whole rows; nothing at the others reads them.
    """

    x: Buffer
    out: Buffer
    borders: tuple[int, ...]
    to: int | None = None
    lines: int = 1

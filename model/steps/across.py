"""Steps that are partly computed by another device, or by another member of a group."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from llamaclust.model.steps.step import Buffer, StepFacts


@dataclass(frozen=True, slots=True)
class Exchange(StepFacts):
    """out[r] = the result for row r that another device computes from `inputs`, for example with its experts."""

    inputs: tuple[Buffer, ...]
    out: Buffer

    @property
    def reads(self) -> tuple[Buffer, ...]:
        return self.inputs


@dataclass(frozen=True, slots=True)
class Gather(StepFacts):
    """Assembles whole rows from the columns that the members of a group have computed. `x` has this member's columns,
    or is None if the member has no columns. A row consists of `lines` parts of equal width. Member i has the columns
    [borders[i], borders[i + 1]) of each part. If `to` is set, only member `to` gets the rows."""

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
        return self.borders[-1] in (end - begin for begin, end in pairwise(self.borders))

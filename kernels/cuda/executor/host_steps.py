"""Steps that the host computes between launches: exchanges with other devices, gathers of a group, and given rows."""

from __future__ import annotations

from dataclasses import dataclass

from llamaclust.model.program import Across, Buffer, GivenRows
from llamaclust.model.quant_types import ActivationFormat


@dataclass(frozen=True, slots=True)
class HostStep:
    step: Across | GivenRows
    number: int  # Index among the steps of the same class, or `GivenRows.level`.
    selected: bool  # True if the step reads only output rows.
    form: ActivationFormat | None = None  # The format in which members of a group send rows; None for floats.

    @property
    def reads(self) -> tuple[Buffer, ...]:
        return self.step.reads

    @property
    def out(self) -> Buffer:
        return self.step.out

    @property
    def row_width(self) -> int:
        return sum(buffer.width for buffer in (*self.reads, self.out))

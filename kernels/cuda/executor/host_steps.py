"""Steps that the host computes between launches: exchanges with other devices, a group's gathers, and given rows."""

from __future__ import annotations

from dataclasses import dataclass

from llamaclust.model.program import Across, Buffer, GivenRows
from llamaclust.model.quant_types import ActivationFormat


@dataclass(frozen=True, slots=True)
class HostStep:
    step: Across | GivenRows
    number: int  # of its kind, in the order of steps
    selected: bool  # it has output rows alone
    form: ActivationFormat | None = None  # in which the members of a group send its rows; None: as floats

    @property
    def reads(self) -> tuple[Buffer, ...]:
        return self.step.reads

    @property
    def out(self) -> Buffer:
        return self.step.out

    @property
    def row_width(self) -> int:
        return sum(buffer.width for buffer in (*self.reads, self.out))

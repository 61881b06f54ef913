from __future__ import annotations

from dataclasses import dataclass, field

from llamaclust.kernels._native import Plan
from llamaclust.model import program as ir
from llamaclust.model.quant_types import ActivationFormat


@dataclass(slots=True)
class Buffers:
    """Assigns numbers to the buffers of a plan. Private buffers, which may have a copy per thread, are for steps that
    compute row by row. Matrix products and attention write to shared buffers."""

    plan: Plan
    rows: int
    ids: dict[tuple[ir.Buffer, bool, int], int] = field(default_factory=dict)
    current: dict[str, tuple[int, bool]] = field(default_factory=dict)
    packed: dict[str, ActivationFormat] = field(default_factory=dict)
    """The format of each buffer whose newest values are int8, by buffer name."""

    def read(self, buffer: ir.Buffer) -> int:
        return self.current[buffer.name][0]

    def is_shared(self, buffer: ir.Buffer) -> bool:
        return not self.current[buffer.name][1]

    def write(self, buffer: ir.Buffer, multiple: int = 1, *, private: bool = False) -> int:
        key = (buffer, private, self.rows)
        if key not in self.ids:
            self.ids[key] = self.plan.add_buffer(buffer.width, multiple, private, self.rows)
        self.current[buffer.name] = (self.ids[key], private)
        self.packed.pop(buffer.name, None)
        return self.ids[key]

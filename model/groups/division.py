"""The program of one member of a group, which computes some output rows of every product.

Values that a product begins, and those that follow from them channel by channel or head by head, stay divided; every
other step needs whole rows, which a `Gather` before it puts together. All members have the same steps, so they meet at
the same gathers. Each output is computed by one member in the order of the whole program: results have its bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from llamaclust.model.groups.gather import Gather
from llamaclust.model.groups.portions import DividedStep, Division, Gathered, borders
from llamaclust.model.mixtures.steps import shard_name
from llamaclust.model.program import Attention, Buffer, MatMul, Program, RmsNorm, Rope, Step
from llamaclust.model.row_steps import Slice

LEADER = 0
"""The member that samples: it alone needs the results of the last stage."""


def divide(program: Program, shares: Sequence[float], member: int) -> Program:
    """What `member` computes, in proportion to the shares. UsageError for what groups do not support."""
    return _Member(shares, member).program(Division.of(program, len(shares)))


@dataclass(frozen=True, slots=True)
class _Member:
    """Emits a member's steps."""

    shares: Sequence[float]
    member: int

    def program(self, division: Division) -> Program:
        steps = [step for divided in division.steps for step in self._steps(divided)]
        to = LEADER if division.program.is_last else None
        steps += (replace(self._gather(gathered), to=to) for gathered in division.gathered)
        return replace(division.program, steps=tuple(steps))

    def _steps(self, divided: DividedStep) -> Iterator[Step]:
        yield from map(self._gather, divided.gathered)
        for buffer in divided.cut:
            yield Slice(buffer, self._own(buffer, divided.units), self._range(divided.units, buffer.width).start)
        yield self._part(divided.step, divided.units) if divided.units else divided.step

    def _gather(self, gathered: Gathered) -> Gather:
        buffer, unit = gathered.buffer, gathered.buffer.width // gathered.units
        places = tuple(unit * border for border in borders(gathered.units, self.shares))
        return Gather(self._own(buffer, gathered.units), buffer, places)

    def _part(self, step: Step, units: int) -> Step:
        match step:
            case MatMul():
                rows = self._range(units, step.out.width)
                bias = None if step.bias is None else shard_name(step.bias, rows)
                return replace(step, out=self._own(step.out, units), weight=shard_name(step.weight, rows), bias=bias)
            case Attention():
                step = self._attention(step, units)
            case Rope() | RmsNorm():
                step = replace(step, heads=len(self._range(units, step.heads)))
        return self._with_own_buffers(step, units)

    def _attention(self, step: Attention, units: int) -> Attention:
        heads = self._range(units, step.heads)
        return replace(
            step,
            heads=len(heads),
            kv_heads=len(self._range(units, step.kv_heads)),
            slopes=None if step.slopes is None else step.slopes[heads.start : heads.stop],
            sinks=None if step.sinks is None else shard_name(step.sinks, heads),
        )

    def _with_own_buffers(self, step: Step, units: int) -> Step:
        fields = {name: getattr(step, name) for name in step.__slots__}
        own: dict[str, Any] = {
            name: self._own(value, units) for name, value in fields.items() if isinstance(value, Buffer)
        }
        return replace(step, **own)

    def _own(self, buffer: Buffer, units: int) -> Buffer:
        return Buffer(f"own {buffer.name}", len(self._range(units, buffer.width)))

    def _range(self, units: int, size: int) -> range:
        """The member's of so many channels, rows or heads."""
        assert size % units == 0, (size, units)
        places, unit = borders(units, self.shares), size // units
        return range(unit * places[self.member], unit * places[self.member + 1])

"""Makes the program of one member of a group, which computes some output rows of every product.

Results of products stay divided, and so do values that are computed from them channel by channel or head by head. For
all other steps, a `Gather` assembles whole rows. Only the leader has the token embeddings, and it sends their rows.
Exactly one member computes each output, in the order of the undivided program, so results have the same bits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from llamaclust.model.groups.portions import DividedStep, Division, Gathered, borders
from llamaclust.model.program import Buffer, Embed, Gather, Program, Slice, Step
from llamaclust.model.steps.step import Units

LEADER = 0
"""The number of the member that samples. Only the leader has the token embeddings and gets the last stage's results."""


def divide(program: Program, shares: Sequence[float], member: int) -> Program:
    """Returns the program of member number `member`, which computes a fraction of each product in proportion to
    `shares[member]`. Raises UsageError if a stage begins or ends inside a layer."""
    return _Member(shares, member).program(Division.of(program, len(shares)))


@dataclass(frozen=True, slots=True)
class _Member:
    shares: Sequence[float]
    member: int

    def program(self, division: Division) -> Program:
        steps = [step for divided in division.steps for step in self._steps(divided)]
        to = LEADER if division.program.is_last else None
        steps += (replace(self._gather(gathered), to=to) for gathered in division.gathered)
        return replace(division.program, steps=tuple(steps))

    def _steps(self, divided: DividedStep) -> Iterator[Step]:
        if isinstance(divided.step, Embed):
            yield from self._embedded(divided.step)
            return
        yield from map(self._gather, divided.gathered)
        units = self._units(divided.units)
        for buffer in divided.cut:
            yield Slice(buffer, units.own(buffer), units.of(buffer.width).start)
        yield _portion(divided.step, units) if divided.units else divided.step

    def _embedded(self, step: Embed) -> Iterator[Step]:
        width, own = step.out.width, None
        if self.member == LEADER:
            own = Buffer(f"own {step.out.name}", width)
            yield replace(step, out=own)
        yield Gather(own, step.out, (0, *(width for _ in self.shares)))

    def _gather(self, gathered: Gathered) -> Gather:
        buffer, lines = gathered.buffer, gathered.lines
        unit = buffer.width // lines // gathered.units
        places = tuple(unit * border for border in borders(gathered.units, self.shares))
        return Gather(self._units(gathered.units).own(buffer), buffer, places, lines=lines)

    def _units(self, count: int) -> Units:
        if not count:
            return Units(0, 0, 1)
        places = borders(count, self.shares)
        return Units(places[self.member], places[self.member + 1], count)


def _portion(step: Step, units: Units) -> Step:
    rule, own = step.division, dict[str, Any]()
    for field in fields(step):
        value = getattr(step, field.name)
        if isinstance(value, Buffer) and value in (*rule.reads, step.out):
            own[field.name] = units.own(value)
        elif field.name == "heads" and rule.heads:
            own[field.name] = len(units.of(value))
    return replace(step.portion(units), **own)

"""The program of one member of a group, which computes some output rows of every product.

Values that a product begins, and those that follow from them channel by channel or head by head, stay divided; every
other step needs whole rows, which a `Gather` before it puts together. The leader alone has the tables of tokens, and
sends their rows to the others. All members meet at the same gathers. Each output is computed by one member in the order
of the whole program: results have its bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from llamaclust.model.dataflow import written_by
from llamaclust.model.groups.gather import Gather
from llamaclust.model.groups.portions import DividedStep, Division, Gathered, borders, divided_reads
from llamaclust.model.mixtures.steps import rows_name, shard_name
from llamaclust.model.program import (
    Adapt,
    Attention,
    Buffer,
    Embed,
    ExpertDown,
    ExpertInner,
    ExpertSum,
    HeadMatMul,
    Join,
    MatMul,
    Moe,
    Program,
    RmsNorm,
    Rope,
    Slice,
    Step,
)

LEADER = 0
"""The member that samples: it alone needs the results of the last stage. It alone has the tables of tokens, too."""


def divide(program: Program, shares: Sequence[float], member: int) -> Program:
    """The program of `member`, in proportion to the shares. UsageError for parts of layers."""
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
        if isinstance(divided.step, Embed):
            yield from self._embedded(divided.step)
            return
        yield from map(self._gather, divided.gathered)
        for buffer in divided.cut:
            yield Slice(buffer, self._own(buffer, divided.units), self._range(divided.units, buffer.width).start)
        yield self._part(divided.step, divided.units) if divided.units else divided.step

    def _embedded(self, step: Embed) -> Iterator[Step]:
        """Rows of the leader's table."""
        width, own = step.out.width, None
        if self.member == LEADER:
            own = Buffer(f"own {step.out.name}", width)
            yield replace(step, out=own)
        yield Gather(own, step.out, (0, *(width for _ in self.shares)))

    def _gather(self, gathered: Gathered) -> Gather:
        buffer, lines = gathered.buffer, gathered.lines
        unit = buffer.width // lines // gathered.units
        places = tuple(unit * border for border in borders(gathered.units, self.shares))
        return Gather(self._own(buffer, gathered.units), buffer, places, lines=lines)

    def _part(self, step: Step, units: int) -> Step:
        own = self._own_buffers(step, units)
        match step:
            case MatMul():
                rows = self._range(units, step.out.width)
                bias = None if step.bias is None else shard_name(step.bias, rows)
                return replace(step, weight=shard_name(step.weight, rows), bias=bias, **own)
            case HeadMatMul():
                heads = self._range(units, step.heads)
                return replace(step, heads=len(heads), weight=shard_name(step.weight, heads), **own)
            case Adapt():
                return replace(step, up=shard_name(step.up, self._range(units, step.out.width)), **own)
            case ExpertInner():
                return replace(step, mixture=self._inner(step.mixture, units), **own)
            case ExpertDown() | ExpertSum():
                return replace(step, mixture=self._down(step.mixture, units), **own)
            case Attention():
                return replace(self._attention(step, units), **own)
            case Rope() | RmsNorm() | Slice() | Join():
                return replace(step, heads=len(self._range(units, step.heads)), **own)
        return replace(step, **own)

    def _own_buffers(self, step: Step, units: int) -> dict[str, Any]:
        """The fields of a step whose buffers are divided, with those of the member."""
        fields = {name: getattr(step, name) for name in step.__slots__}
        divided = (*divided_reads(step), written_by(step))
        return {
            name: self._own(buffer, units)
            for name, buffer in fields.items()
            if isinstance(buffer, Buffer) and buffer in divided
        }

    def _inner(self, mixture: Moe, units: int) -> Moe:
        """The step with the member's rows of gate and up."""
        rows, ffn_width = self._range(units, mixture.ffn_width), mixture.ffn_width
        up, gate = rows, None if mixture.gate is None else rows_name(mixture.gate, rows)
        if mixture.fused:
            assert mixture.up_bias is None
            up, gate = range(rows.start + ffn_width, rows.stop + ffn_width), rows_name(mixture.up, rows)
        return replace(
            mixture,
            ffn_width=len(rows),
            gate=gate,
            up=rows_name(mixture.up, up),
            fused=False,
            gate_bias=_rows_of(mixture.gate_bias, rows),
            up_bias=_rows_of(mixture.up_bias, rows),
        )

    def _down(self, mixture: Moe, units: int) -> Moe:
        """The step with the member's rows of down."""
        rows, out = self._range(units, mixture.out.width), self._own(mixture.out, units)
        bias = _rows_of(mixture.down_bias, rows)
        return replace(mixture, out=out, down=rows_name(mixture.down, rows), down_bias=bias)

    def _attention(self, step: Attention, units: int) -> Attention:
        heads = self._range(units, step.heads)
        return replace(
            step,
            heads=len(heads),
            kv_heads=1 if step.kv_heads == 1 else len(self._range(units, step.kv_heads)),
            slopes=None if step.slopes is None else step.slopes[heads.start : heads.stop],
            sinks=None if step.sinks is None else shard_name(step.sinks, heads),
        )

    def _own(self, buffer: Buffer, units: int) -> Buffer:
        return Buffer(f"own {buffer.name}", len(self._range(units, buffer.width)))

    def _range(self, units: int, size: int) -> range:
        """The member's of so many channels, rows or heads."""
        assert size % units == 0, (size, units)
        places, unit = borders(units, self.shares), size // units
        return range(unit * places[self.member], unit * places[self.member + 1])


def _rows_of(name: str | None, rows: range) -> str | None:
    return None if name is None else rows_name(name, rows)

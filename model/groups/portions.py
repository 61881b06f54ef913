"""Finds the step results that members of a group divide, and the number of equal units of each. Members divide the
results of products, and results that are computed from them channel by channel or head by head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import gcd

from llamaclust.core.errors import UsageError
from llamaclust.model.groups.separation import separated
from llamaclust.model.program import (
    Adapt,
    Attention,
    Buffer,
    Join,
    MatMul,
    Program,
    RmsNorm,
    Rope,
    SelectRows,
    Slice,
    Step,
)
from llamaclust.model.quant_types import TILE_ROWS, ActivationFormat

_LEAST_UNITS = {ActivationFormat.Q8_256: 16, ActivationFormat.Q8_32: 8}
"""Minimum number of quantized blocks per member. With fewer, a member's portion could differ much from its share."""


def borders(units: int, shares: Sequence[float]) -> tuple[int, ...]:
    """Returns borders that divide `units` units nearly in proportion to `shares`, with at least one unit per share."""
    assert units >= len(shares)
    found, total = [0], sum(shares)
    for i in range(1, len(shares)):
        wanted = round(units * sum(shares[:i]) / total)
        found.append(min(max(wanted, found[-1] + 1), units - (len(shares) - i)))
    return (*found, units)


@dataclass(slots=True)
class _Portion:
    """Buffers that members divide into the same number of `units`. If `joined` is set, it replaces this object."""

    units: int = 0
    has_heads: bool = False
    joined: _Portion | None = None

    def found(self) -> _Portion:
        return self if self.joined is None else self.joined.found()

    def in_heads(self, heads: int) -> None:
        self.units = gcd(self.units, heads) if self.has_heads else heads
        self.has_heads = True

    def join(self, other: _Portion) -> None:
        if other is self:
            return
        if other.has_heads:
            self.in_heads(other.units)
        elif not self.has_heads:
            self.units = gcd(self.units, other.units)
        other.joined = self


@dataclass(frozen=True, slots=True)
class Gathered:
    buffer: Buffer
    units: int
    lines: int  # Number of equal parts in each row. All parts are divided in the same way.


@dataclass(frozen=True, slots=True)
class DividedStep:
    """A step of the undivided program. Members divide the step's result into `units`. If `units` is 0, each member
    computes the whole result. Before the step, buffers in `gathered` are assembled from all members. A member reads
    only its own columns of buffers in `cut`."""

    step: Step
    units: int
    gathered: tuple[Gathered, ...]
    cut: tuple[Buffer, ...]


@dataclass(frozen=True, slots=True)
class Division:
    """The division of a program. Buffers in `gathered` are assembled from all members after the last step."""

    program: Program
    steps: tuple[DividedStep, ...]
    gathered: tuple[Gathered, ...]

    @classmethod
    def of(cls, program: Program, members: int) -> Division:
        if program.shards > 1:
            raise UsageError("a group needs whole layers, but stages begin or end inside a layer's experts")
        steps = tuple(separated(program.steps))
        rows, units = _Rows(program.normed), _units_of(steps, members)
        divided = tuple(map(rows.step, steps, units))
        results = [buffer for buffer in (program.out, program.normed) if buffer is not None]
        return cls(program, divided, rows.gathered(results))


def _units_of(steps: Sequence[Step], members: int) -> list[int]:
    """Returns the number of units of each step's result. 0 means that each member computes the whole result."""
    found, current, kept = list[_Portion | None](), dict[str, _Portion | None](), dict[int, _Portion | None]()
    shared = _products_of_shared_keys(steps)
    for at, step in enumerate(steps):
        read = [current.get(buffer.name) for buffer in step.division.reads]
        if isinstance(step, Attention) and step.kv_heads > 1 and step.shares_kv and step.layer in kept:
            read.append(kept[step.layer])
        portion = _portion_of(step, members, [None if each is None else each.found() for each in read])
        portion = None if at in shared else portion
        found.append(portion)
        current[step.out.name] = portion
        if isinstance(step, Attention):
            kept[step.layer] = portion
    units = (0 if portion is None else portion.found().units for portion in found)
    return [count if count >= members else 0 for count in units]


def _products_of_shared_keys(steps: Sequence[Step]) -> set[int]:
    """Returns the indices of the products that compute a layer's only KV head. Every member runs these products."""
    found, wanted = set[int](), set[str]()
    for at, step in reversed([*enumerate(steps)]):
        name = step.out.name
        if isinstance(step, Attention) and step.kv_heads == 1:
            wanted |= {buffer.name for buffer in step.reads[1:]}
        elif name in wanted and not isinstance(step, Adapt):
            wanted.discard(name)
            if isinstance(step, MatMul):
                found.add(at)
            elif isinstance(step, Slice | Join | RmsNorm | Rope):
                wanted |= {buffer.name for buffer in step.reads}
    return found


@dataclass(slots=True)
class _Rows:
    normed: Buffer | None
    _divided: dict[str, Gathered] = field(default_factory=dict)
    _whole: set[str] = field(default_factory=set)

    def step(self, step: Step, units: int) -> DividedStep:
        reads, out = step.reads, step.out
        own = step.division.reads if units else ()
        kept = (self.normed,) if isinstance(step, SelectRows) and self.normed is not None else ()
        gathered = self.gathered([buffer for buffer in (*reads, *kept) if buffer not in own])
        cut = tuple(buffer for buffer in own if buffer.name not in self._divided)
        self._divided.pop(out.name, None)
        self._whole.discard(out.name)
        if units:
            self._divided[out.name] = Gathered(out, units, step.division.lines)
        return DividedStep(step, units, gathered, cut)

    def gathered(self, read: Sequence[Buffer]) -> tuple[Gathered, ...]:
        names = dict.fromkeys(buffer.name for buffer in read if buffer.name in self._divided.keys() - self._whole)
        self._whole |= names.keys()
        return tuple(self._divided[name] for name in names)


def _product_units(width: int, members: int) -> int:
    for segment, least in _LEAST_UNITS.items():
        if width % segment == 0 and width // segment >= least * members:
            return width // segment
    return width // TILE_ROWS if width % TILE_ROWS == 0 else 1


def _portion_of(step: Step, members: int, read: Sequence[_Portion | None]) -> _Portion | None:
    if step.division.rows:
        return _Portion(_product_units(step.division.rows, members))
    divided = [portion for portion in read if portion is not None]
    cuts = isinstance(step, Attention) and step.kv_heads > 1
    if not read or (len(divided) < len(read) and not cuts):
        return None
    first = divided[0] if divided else _Portion()
    if step.division.heads:
        first.in_heads(step.division.heads)
    for other in divided[1:]:
        first.join(other.found())
    return first

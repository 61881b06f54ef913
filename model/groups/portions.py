"""Which values of a program are divided among the members of a group, and in how many units.

Values that a product begins, and those that follow from them channel by channel or head by head, stay divided; every
other step reads whole rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import gcd

from llamaclust.model.dataflow import read_before_written, reads_of, written_by
from llamaclust.model.mixtures.steps import shard_name
from llamaclust.model.program import Adapt, Attention, Buffer, MatMul, Program, RmsNorm, Rope, Step
from llamaclust.model.quant_types import TILE_ROWS
from llamaclust.model.row_steps import Activate, Add, Mul, PositionScale, Scale, SiluMul, Slice, SoftCap


def undividable(program: Program) -> str | None:
    """Why groups cannot compute it; None where they can."""
    if any(isinstance(step, Attention) and step.shares_kv for step in program.steps):
        return "layers that read the keys and values of others cannot be divided in a group"
    if any(isinstance(step, Adapt) for step in program.steps):
        return "adapters cannot be divided in a group"
    return None


def borders(units: int, shares: Sequence[float]) -> tuple[int, ...]:
    """Where the portions of so many units begin and end: each of at least one, nearly in proportion to the shares."""
    assert units >= len(shares)
    found, total = [0], sum(shares)
    for i in range(1, len(shares)):
        wanted = round(units * sum(shares[:i]) / total)
        found.append(min(max(wanted, found[-1] + 1), units - (len(shares) - i)))
    return (*found, units)


def _separate(steps: Sequence[Step]) -> Iterator[Step]:
    """Products whose results are cut into slices become one for each slice: those of queries, keys and values, say."""
    at = 0
    while at < len(steps):
        step, at = steps[at], at + 1
        slices = _slices(step, steps[at:]) if isinstance(step, MatMul) else []
        if not isinstance(step, MatMul) or not slices or _is_read(steps[at + len(slices) :], step.out):
            yield step
            continue
        at += len(slices)
        for cut in slices:
            rows = range(cut.start, cut.start + cut.out.width)
            bias = None if step.bias is None else shard_name(step.bias, rows)
            yield replace(step, out=cut.out, weight=shard_name(step.weight, rows), bias=bias)


def _slices(product: MatMul, steps: Sequence[Step]) -> list[Slice]:
    """The steps at the front that cut the product's result, each into one piece and into another buffer."""
    found: list[Slice] = []
    for step in steps:
        if not isinstance(step, Slice) or step.x != product.out or step.heads > 1:
            break
        if step.out.name in {product.x.name, product.out.name}:
            break
        found.append(step)
    return found


def _is_read(steps: Sequence[Step], buffer: Buffer) -> bool:
    """Whether one of the steps reads what the buffer has before them."""
    return buffer.name in {read.name for read in read_before_written(steps)}


@dataclass(slots=True)
class Portion:
    """Values that are divided alike: in `units`, whatever their widths. `joined`: it is now a part of that one."""

    units: int = 0
    has_heads: bool = False
    joined: Portion | None = None

    def found(self) -> Portion:
        return self if self.joined is None else self.joined.found()

    def in_heads(self, heads: int) -> None:
        self.units = gcd(self.units, heads) if self.has_heads else heads
        self.has_heads = True

    def join(self, other: Portion) -> None:
        if other is self:
            return
        if other.has_heads:
            self.in_heads(other.units)
        elif not self.has_heads:
            self.units = gcd(self.units, other.units)
        other.joined = self


@dataclass(slots=True)
class Portions:
    """For each step of a program the portion that its result belongs to; None where it is whole."""

    program: Program  # with products apart whose results are cut into slices
    members: int
    _of_steps: list[Portion | None] = field(default_factory=list)

    @classmethod
    def of(cls, program: Program, members: int) -> Portions:
        program = replace(program, steps=tuple(_separate(program.steps)))
        found, current = cls(program, members), dict[str, Portion | None]()
        for step in program.steps:
            read = [current.get(buffer.name) for buffer in reads_of(step)]
            portion = _portion_of(step, [None if each is None else each.found() for each in read])
            found._of_steps.append(portion)
            current[written_by(step).name] = portion
        return found

    def of_step(self, at: int) -> Portion | None:
        """None, too, where there are fewer units than members."""
        portion = self._of_steps[at]
        portion = None if portion is None else portion.found()
        return None if portion is None or portion.units < self.members else portion


def _portion_of(step: Step, read: Sequence[Portion | None]) -> Portion | None:
    if isinstance(step, MatMul):
        return Portion(step.out.width // TILE_ROWS if step.out.width % TILE_ROWS == 0 else 1)
    divided = [portion for portion in read if portion is not None]
    is_attention = isinstance(step, Attention) and step.v is not None
    if not is_attention and (not divided or len(divided) < len(read)):
        return None
    first = divided[0] if divided else Portion()
    match step:
        case Attention():
            first.in_heads(step.kv_heads)
        case Rope():
            first.in_heads(step.heads)
        case RmsNorm(own_weights=False) if step.heads > 1:
            first.in_heads(step.heads)
        case SiluMul() | Activate() | Add() | Mul() | Scale() | SoftCap() | PositionScale():
            pass
        case _:
            return None
    for other in divided[1:]:
        first.join(other.found())
    return first

"""Which values of a program are divided among the members of a group, and in how many units.

Values that a product begins, and those that follow from them channel by channel or head by head, stay divided; every
other step reads whole rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import gcd

from llamaclust.core.errors import UsageError
from llamaclust.model.dataflow import read_before_written, reads_of, written_by
from llamaclust.model.mixtures.steps import shard_name
from llamaclust.model.program import Adapt, Attention, Buffer, MatMul, Program, RmsNorm, Rope, Step
from llamaclust.model.quant_types import TILE_ROWS, ActivationFormat
from llamaclust.model.row_steps import Activate, Add, Mul, PositionScale, Scale, SiluMul, Slice, SoftCap

_SEGMENT_COLUMNS = ActivationFormat.Q8_256.value
_LEAST_SEGMENTS = 16
"""A member's, so that portions are a thirtieth from their shares at most."""


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
class _Portion:
    """Values that are divided alike: in `units`, whatever their widths. `joined`: it is now a part of that one."""

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
    """Rows that members put together, each of which has some of the units."""

    buffer: Buffer
    units: int


@dataclass(frozen=True, slots=True)
class DividedStep:
    """A step of the whole program, whose result is divided in `units`; 0: every member has it whole.

    Before it, rows of `gathered` buffers are put together; members take their columns of the whole rows of `cut` ones.
    """

    step: Step
    units: int
    gathered: tuple[Gathered, ...]
    cut: tuple[Buffer, ...]


@dataclass(frozen=True, slots=True)
class Division:
    """A program as it is divided among so many members, in whatever shares. `gathered`: results, behind all steps."""

    program: Program
    steps: tuple[DividedStep, ...]
    gathered: tuple[Gathered, ...]

    @classmethod
    def of(cls, program: Program, members: int) -> Division:
        """UsageError for what groups do not support."""
        if (reason := undividable(program)) is not None:
            raise UsageError(reason)
        steps = tuple(_separate(program.steps))
        divider, units = _Rows(), _units_of(steps, members)
        divided = tuple(map(divider.step, steps, units))
        results = [buffer for buffer in (program.out, program.normed) if buffer is not None]
        return cls(program, divided, divider.gathered(results))


def _units_of(steps: Sequence[Step], members: int) -> list[int]:
    """Of each step's result. What has fewer units than there are members is not divided."""
    found, current = list[_Portion | None](), dict[str, _Portion | None]()
    for step in steps:
        read = [current.get(buffer.name) for buffer in reads_of(step)]
        portion = _portion_of(step, members, [None if each is None else each.found() for each in read])
        found.append(portion)
        current[written_by(step).name] = portion
    units = (0 if portion is None else portion.found().units for portion in found)
    return [count if count >= members else 0 for count in units]


@dataclass(slots=True)
class _Rows:
    """What is divided after the steps so far, in how many units, and which of it is put together already."""

    _units: dict[str, int] = field(default_factory=dict)
    _whole: set[str] = field(default_factory=set)

    def step(self, step: Step, units: int) -> DividedStep:
        keeps = units > 0 and not isinstance(step, MatMul)
        reads, name = reads_of(step), written_by(step).name
        cut = tuple(buffer for buffer in reads if keeps and buffer.name not in self._units)
        found = DividedStep(step, units, () if keeps else self.gathered(reads), cut)
        self._units.pop(name, None)
        self._whole.discard(name)
        if units:
            self._units[name] = units
        return found

    def gathered(self, read: Sequence[Buffer]) -> tuple[Gathered, ...]:
        buffers = {buffer.name: buffer for buffer in read if buffer.name in self._units.keys() - self._whole}
        self._whole |= buffers.keys()
        return tuple(Gathered(buffer, self._units[name]) for name, buffer in buffers.items())


def _product_units(width: int, members: int) -> int:
    """Whole tiles of weights; of a wide product what has one scale in the next one, which is then quantized before it
    is gathered."""
    if width % _SEGMENT_COLUMNS == 0 and width // _SEGMENT_COLUMNS >= _LEAST_SEGMENTS * members:
        return width // _SEGMENT_COLUMNS
    return width // TILE_ROWS if width % TILE_ROWS == 0 else 1


def _portion_of(step: Step, members: int, read: Sequence[_Portion | None]) -> _Portion | None:
    if isinstance(step, MatMul):
        return _Portion(_product_units(step.out.width, members))
    divided = [portion for portion in read if portion is not None]
    is_attention = isinstance(step, Attention) and step.v is not None
    if not is_attention and (not divided or len(divided) < len(read)):
        return None
    first = divided[0] if divided else _Portion()
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

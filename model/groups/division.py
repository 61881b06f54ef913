"""The program of one member of a group, which computes some output rows of every product.

Values that a product begins, and those that follow from them channel by channel or head by head, stay divided; every
other step needs whole rows, which a `Gather` before it puts together. All members have the same steps, so they meet at
the same gathers. Each output is computed by one member in the order of the whole program: results have its bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import gcd
from typing import Any

from llamaclust.core.errors import UsageError
from llamaclust.model.dataflow import read_before_written, reads_of, written_by
from llamaclust.model.groups.gather import Gather
from llamaclust.model.mixtures.steps import shard_name
from llamaclust.model.program import Adapt, Attention, Buffer, MatMul, Program, RmsNorm, Rope, Step
from llamaclust.model.quant_types import TILE_ROWS
from llamaclust.model.row_steps import Activate, Add, Mul, PositionScale, Scale, SiluMul, Slice, SoftCap


def divide(program: Program, shares: Sequence[float], member: int) -> Program:
    """What `member` computes, in proportion to the shares. UsageError for what groups do not support."""
    if any(isinstance(step, Attention) and step.shares_kv for step in program.steps):
        raise UsageError("layers that read the keys and values of others cannot be divided in a group")
    if any(isinstance(step, Adapt) for step in program.steps):
        raise UsageError("adapters cannot be divided in a group")
    program = replace(program, steps=tuple(_separate(program.steps)))
    return _Divider(shares, member, _Portions.of(program, len(shares))).run(program)


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


@dataclass(slots=True)
class _Portions:
    """For each step the portion that its result belongs to; None where it is whole."""

    members: int
    of_steps: list[_Portion | None] = field(default_factory=list)

    @classmethod
    def of(cls, program: Program, members: int) -> _Portions:
        found, current = cls(members), dict[str, _Portion | None]()
        for step in program.steps:
            read = [current.get(buffer.name) for buffer in reads_of(step)]
            portion = _portion_of(step, [None if each is None else each.found() for each in read])
            found.of_steps.append(portion)
            current[written_by(step).name] = portion
        return found

    def of_step(self, at: int) -> _Portion | None:
        """None, too, where there are fewer units than members."""
        portion = self.of_steps[at]
        portion = None if portion is None else portion.found()
        return None if portion is None or portion.units < self.members else portion


def _portion_of(step: Step, read: Sequence[_Portion | None]) -> _Portion | None:
    if isinstance(step, MatMul):
        return _Portion(step.out.width // TILE_ROWS if step.out.width % TILE_ROWS == 0 else 1)
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


class _Divider:
    """Emits a member's steps."""

    def __init__(self, shares: Sequence[float], member: int, portions: _Portions) -> None:
        self._shares, self._member, self._portions = shares, member, portions
        self._divided: dict[str, _Portion] = {}  # what has a portion now, by the name of the whole buffer
        self._whole: set[str] = set()  # which of these are gathered already

    def run(self, program: Program) -> Program:
        steps: list[Step] = []
        for at, step in enumerate(program.steps):
            portion = self._portions.of_step(at)
            keeps = portion is not None and not isinstance(step, MatMul)
            steps += self._own_parts(step, portion) if keeps else self._gathers(reads_of(step))
            steps.append(step if portion is None else self._portion(step, portion))
            name = written_by(step).name
            self._divided.pop(name, None)
            self._whole.discard(name)
            if portion is not None:
                self._divided[name] = portion
        results = (program.out, program.normed)
        steps += self._gathers([buffer for buffer in results if buffer is not None])
        return replace(program, steps=tuple(steps))

    def _gathers(self, read: Sequence[Buffer]) -> Iterator[Gather]:
        for buffer in read:
            portion = self._divided.get(buffer.name)
            if portion is None or buffer.name in self._whole:
                continue
            self._whole.add(buffer.name)
            unit = buffer.width // portion.units
            places = tuple(unit * border for border in borders(portion.units, self._shares))
            yield Gather(self._own(buffer, portion), buffer, places)

    def _own_parts(self, step: Step, portion: _Portion | None) -> Iterator[Slice]:
        """The member's columns of what is whole before a divided step."""
        for buffer in reads_of(step):
            if portion is not None and buffer.name not in self._divided:
                yield Slice(buffer, self._own(buffer, portion), self._range(portion, buffer.width).start)

    def _portion(self, step: Step, portion: _Portion) -> Step:
        match step:
            case MatMul():
                rows = self._range(portion, step.out.width)
                bias = None if step.bias is None else shard_name(step.bias, rows)
                out = self._own(step.out, portion)
                return replace(step, out=out, weight=shard_name(step.weight, rows), bias=bias)
            case Attention():
                return self._attention(step, portion)
            case Rope() | RmsNorm():
                step = replace(step, heads=len(self._range(portion, step.heads)))
        return self._with_own_buffers(step, portion)

    def _attention(self, step: Attention, portion: _Portion) -> Step:
        heads = self._range(portion, step.heads)
        divided = replace(
            step,
            heads=len(heads),
            kv_heads=len(self._range(portion, step.kv_heads)),
            slopes=None if step.slopes is None else step.slopes[heads.start : heads.stop],
            sinks=None if step.sinks is None else shard_name(step.sinks, heads),
        )
        return self._with_own_buffers(divided, portion)

    def _with_own_buffers(self, step: Step, portion: _Portion) -> Step:
        fields = {name: getattr(step, name) for name in step.__slots__}
        own: dict[str, Any] = {
            name: self._own(value, portion) for name, value in fields.items() if isinstance(value, Buffer)
        }
        return replace(step, **own)

    def _own(self, buffer: Buffer, portion: _Portion) -> Buffer:
        return Buffer(f"own {buffer.name}", len(self._range(portion, buffer.width)))

    def _range(self, portion: _Portion, size: int) -> range:
        """The member's of so many channels, rows or heads."""
        assert size % portion.units == 0, (size, portion.units)
        places, unit = borders(portion.units, self._shares), size // portion.units
        return range(unit * places[self._member], unit * places[self._member + 1])

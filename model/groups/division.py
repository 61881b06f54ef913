"""The program of one member of a group, which computes some output rows of every product.

Values that a product begins, and those that follow from them channel by channel or head by head, stay divided; every
other step needs whole rows, which a `Gather` before it puts together. All members have the same steps, so they meet at
the same gathers. Each output is computed by one member in the order of the whole program: results have its bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from llamaclust.core.errors import UsageError
from llamaclust.model.dataflow import reads_of, written_by
from llamaclust.model.groups.gather import Gather
from llamaclust.model.groups.portions import Portion, Portions, borders, undividable
from llamaclust.model.mixtures.steps import shard_name
from llamaclust.model.program import Attention, Buffer, MatMul, Program, RmsNorm, Rope, Step
from llamaclust.model.row_steps import Slice


def divide(program: Program, shares: Sequence[float], member: int) -> Program:
    """What `member` computes, in proportion to the shares. UsageError for what groups do not support."""
    if (reason := undividable(program)) is not None:
        raise UsageError(reason)
    return _Divider(shares, member, Portions.of(program, len(shares))).run()


class _Divider:
    """Emits a member's steps."""

    def __init__(self, shares: Sequence[float], member: int, portions: Portions) -> None:
        self._shares, self._member, self._portions = shares, member, portions
        self._divided: dict[str, Portion] = {}  # what has a portion now, by the name of the whole buffer
        self._whole: set[str] = set()  # which of these are gathered already

    def run(self) -> Program:
        program, steps = self._portions.program, list[Step]()
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

    def _own_parts(self, step: Step, portion: Portion | None) -> Iterator[Slice]:
        """The member's columns of what is whole before a divided step."""
        for buffer in reads_of(step):
            if portion is not None and buffer.name not in self._divided:
                yield Slice(buffer, self._own(buffer, portion), self._range(portion, buffer.width).start)

    def _portion(self, step: Step, portion: Portion) -> Step:
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

    def _attention(self, step: Attention, portion: Portion) -> Step:
        heads = self._range(portion, step.heads)
        divided = replace(
            step,
            heads=len(heads),
            kv_heads=len(self._range(portion, step.kv_heads)),
            slopes=None if step.slopes is None else step.slopes[heads.start : heads.stop],
            sinks=None if step.sinks is None else shard_name(step.sinks, heads),
        )
        return self._with_own_buffers(divided, portion)

    def _with_own_buffers(self, step: Step, portion: Portion) -> Step:
        fields = {name: getattr(step, name) for name in step.__slots__}
        own: dict[str, Any] = {
            name: self._own(value, portion) for name, value in fields.items() if isinstance(value, Buffer)
        }
        return replace(step, **own)

    def _own(self, buffer: Buffer, portion: Portion) -> Buffer:
        return Buffer(f"own {buffer.name}", len(self._range(portion, buffer.width)))

    def _range(self, portion: Portion, size: int) -> range:
        """The member's of so many channels, rows or heads."""
        assert size % portion.units == 0, (size, portion.units)
        places, unit = borders(portion.units, self._shares), size // portion.units
        return range(unit * places[self._member], unit * places[self._member + 1])

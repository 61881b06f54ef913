"""The base of all steps: buffers, weights, costs and division. Backends do the arithmetic."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from enum import Enum, auto
from math import prod
from typing import Self


@dataclass(frozen=True, slots=True)
class Buffer:
    """A float32 matrix [rows, width] of activations. Buffers with the same name share memory."""

    name: str
    width: int


class WeightKind(Enum):
    """The use of a weight. NUMBERS are vectors that are added to rows or multiply their channels. The other kinds are
    multiplied with rows: a MATRIX, a mixture's ROUTER, and EXPERTS, which has a matrix for each expert."""

    NUMBERS = auto()
    MATRIX = auto()
    ROUTER = auto()
    EXPERTS = auto()


@dataclass(frozen=True, slots=True)
class StepWeight:
    """A tensor that a step reads. -1 in `shape` means any length. Each row uses `used` of the `experts` matrices."""

    name: str
    shape: tuple[int, ...]
    kind: WeightKind = WeightKind.NUMBERS
    used: int = 1
    experts: int = 1

    @property
    def macs(self) -> int:
        return 0 if self.kind is WeightKind.NUMBERS else prod(self.shape) * self.used // self.experts


def optional_weight(name: str | None, *shape: int) -> tuple[StepWeight, ...]:
    return () if name is None else (StepWeight(name, shape),)


@dataclass(frozen=True, slots=True)
class DivisionRule:
    """The rule by which members of a group divide a step's result. If `rows` is not 0, they divide the `rows` rows of a
    weight matrix. Otherwise, they divide the result like the buffers in `reads`. If `heads` is not 0, heads stay whole.
    A row's `lines` parts are divided alike. If `has_part`, a member has only a part of weights or KV memory."""

    reads: tuple[Buffer, ...] = ()
    heads: int = 0
    rows: int = 0
    lines: int = 1
    has_part: bool = False


WHOLE = DivisionRule()


def by_heads(reads: tuple[Buffer, ...], heads: int) -> DivisionRule:
    return DivisionRule(reads, heads) if heads > 1 else WHOLE


@dataclass(frozen=True, slots=True)
class Units:
    """A group member's portion of divided values: units [start, end) of `count` equal units."""

    start: int
    end: int
    count: int

    def of(self, size: int) -> range:
        assert size % self.count == 0, (size, self.count)
        unit = size // self.count
        return range(unit * self.start, unit * self.end)

    def own(self, buffer: Buffer) -> Buffer:
        return Buffer(f"own {buffer.name}", len(self.of(buffer.width)))


class StepFacts:  # No ABC, whose isinstance takes several times as long: plans ask it millions of times.
    """The properties that every step has, besides its output buffer `out`."""

    __slots__ = ()

    is_elementwise = False
    """True if each channel of `out` is computed from the same channel of the inputs."""
    is_embedding = False
    """True for steps before the first layer."""

    @property
    @abstractmethod
    def reads(self) -> tuple[Buffer, ...]:
        """The buffers that the step reads, in the order of their use."""

    @property
    def weights(self) -> tuple[StepWeight, ...]:
        return ()

    @property
    def state_macs(self) -> int:
        """The multiply-accumulates with the recurrent state for one row, in float32."""
        return 0

    @property
    def sent_format(self) -> str | None:
        """The name of the weight that multiplies x, or None. Members of a group may send x in this weight's format."""
        return None

    @property
    def division(self) -> DivisionRule:
        return DivisionRule(self.reads) if self.is_elementwise else WHOLE

    def portion(self, own: Units) -> Self:
        """Returns the step with only the units `own` of each divided weight. Does not change buffers and heads."""
        return self


@dataclass(frozen=True, slots=True)
class UnaryStep(StepFacts):
    x: Buffer
    out: Buffer

    @property
    def reads(self) -> tuple[Buffer, ...]:
        return (self.x,)


@dataclass(frozen=True, slots=True)
class BinaryStep(StepFacts):
    x: Buffer
    y: Buffer
    out: Buffer

    @property
    def reads(self) -> tuple[Buffer, ...]:
        return self.x, self.y

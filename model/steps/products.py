"""Products of rows with weight matrices, and the changes that adapters make to these products."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

from llamaclust.model.shard_names import shard_name
from llamaclust.model.steps.step import Buffer, DivisionRule, StepWeight, UnaryStep, Units, WeightKind, optional_weight


@dataclass(frozen=True, slots=True)
class MatMul(UnaryStep):
    """Computes out = x @ weight^T (+ bias). weight is [out.width, x.width] in GGUF's row order."""

    weight: str
    bias: str | None = None

    @property
    def weights(self) -> tuple[StepWeight, ...]:
        weight = StepWeight(self.weight, (self.out.width, self.x.width), WeightKind.MATRIX)
        return weight, *optional_weight(self.bias, self.out.width)

    @property
    def sent_format(self) -> str:
        return self.weight

    @property
    def division(self) -> DivisionRule:
        return DivisionRule(rows=self.out.width, has_part=True)

    def portion(self, own: Units) -> Self:
        return self.of_rows(own.of(self.out.width))

    def of_rows(self, rows: range) -> Self:
        bias = None if self.bias is None else shard_name(self.bias, rows)
        return replace(self, weight=shard_name(self.weight, rows), bias=bias)


@dataclass(frozen=True, slots=True)
class HeadMatMul(UnaryStep):
    """Computes out_h = x_h @ weight_h^T for each of the `heads` equal parts of a row. weight is [heads, out.width /
    heads, x.width / heads] in GGUF's row order."""

    weight: str
    heads: int

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.heads, self.out.width // self.heads, self.x.width // self.heads

    @property
    def weights(self) -> tuple[StepWeight, ...]:
        return (StepWeight(self.weight, self.shape, WeightKind.MATRIX),)

    @property
    def division(self) -> DivisionRule:
        return DivisionRule(self.reads, self.heads, has_part=True)

    def portion(self, own: Units) -> Self:
        return replace(self, weight=shard_name(self.weight, own.of(self.heads)))


@dataclass(frozen=True, slots=True)
class Adapt(UnaryStep):
    """Adds an adapter's change: out += scale * (x @ down^T) @ up^T. down is [rank, x.width]. up is [out.width, rank].
    `scale` is `factor` times the batch's scale for this adapter and row. A row with scale 0 is not changed."""

    adapter: int
    down: str
    up: str
    rank: int
    factor: float

    @property
    def reads(self) -> tuple[Buffer, ...]:
        return self.x, self.out

    @property
    def weights(self) -> tuple[StepWeight, ...]:
        up = StepWeight(self.up, (self.out.width, self.rank), WeightKind.MATRIX)
        return up, StepWeight(self.down, (self.rank, self.x.width), WeightKind.MATRIX)

    @property
    def division(self) -> DivisionRule:
        return DivisionRule((self.out,))

    def portion(self, own: Units) -> Self:
        return self.of_rows(own.of(self.out.width))

    def of_rows(self, rows: range) -> Self:
        return replace(self, up=shard_name(self.up, rows))

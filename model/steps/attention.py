"""Attention, and RoPE of its queries and keys."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

from llamaclust.model.kv_type import KvType
from llamaclust.model.shard_names import shard_name
from llamaclust.model.steps.options import RopeStyle
from llamaclust.model.steps.step import Buffer, DivisionRule, StepFacts, StepWeight, Units, optional_weight

SPAN_TOKENS = 512
"""The number of positions in a span. Attention computes whole spans from position 0, and merges results in order."""


@dataclass(frozen=True, slots=True)
class RopeTable:
    """RoPE frequencies: pair i rotates by position * frequencies[i], in float64. `scale` multiplies cos and sin."""

    frequencies: tuple[float, ...]
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class Rope(StepFacts):
    """Rotates the first 2 * len(table.frequencies) channels of each head of x in place, by the row's position. If rows
    have several positions, such as time, height and width, sections[i] selects the position that rotates pair i."""

    x: Buffer
    heads: int
    head_dim: int
    style: RopeStyle
    table: RopeTable
    sections: tuple[int, ...] | None = None

    @property
    def reads(self) -> tuple[Buffer, ...]:
        return (self.x,)

    @property
    def out(self) -> Buffer:
        return self.x

    @property
    def division(self) -> DivisionRule:
        return DivisionRule(self.reads, self.heads)


@dataclass(frozen=True, slots=True)
class Attention(StepFacts):
    """Rounds k and v to the KV type, stores them at the rows' positions in KV memory of `layer`, and computes out.

    q and out are [rows, heads * head_dim]. k and v are [rows, kv_heads * head_dim]. Query head h reads KV head h //
    (heads / kv_heads). scores = (q . k) * scale. With `soft_cap`, scores are then soft_cap * tanh(scores / soft_cap).
    `slopes` (one for each query head) add -slope * distance. `sinks` [heads] has a score for each query head that
    enters the softmax without a value.

    A row attends to its own position and all earlier positions of its sequence. With a `window`, it attends only to the
    last `window` positions. If `chunked`, it attends only to positions since the last multiple of `window`. If not
    `causal`, it attends to its whole sequence, which must be in one microbatch. If not `causal` but with a `window`, it
    attends to the positions up to window // 2 before and after its own. If the batch has groups, a row of causal
    attention attends to the later positions of its group too. If `grouped`, attention is not causal, has no window, and
    a row attends to exactly its group.

    If v is None, attention is latent. There is one KV head. Its values are the first channels of its keys, so only its
    keys are stored. out is [rows, heads * value_dim]. There is no window, and there are no slopes. If `shares_kv`, an
    earlier step has stored the keys and values of `layer`, and k and v are not read. A later step that is not causal
    may overwrite them, so only steps of the same run may read them."""

    q: Buffer
    k: Buffer
    v: Buffer | None
    out: Buffer
    layer: int
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    kv_type: KvType = KvType.F16
    window: int | None = None
    soft_cap: float | None = None
    slopes: tuple[float, ...] | None = None
    causal: bool = True
    sinks: str | None = None
    shares_kv: bool = False
    chunked: bool = False
    grouped: bool = False

    @property
    def value_dim(self) -> int:
        return self.out.width // max(self.heads, 1)

    @property
    def kv_token_bytes(self) -> int:
        bytes_of = self.kv_type.key_bytes if self.v is None else self.kv_type.pair_bytes
        return self.kv_heads * bytes_of(self.head_dim)

    @property
    def reads(self) -> tuple[Buffer, ...]:
        if self.shares_kv:
            return (self.q,)
        return (self.q, self.k) if self.v is None else (self.q, self.k, self.v)

    @property
    def weights(self) -> tuple[StepWeight, ...]:
        return optional_weight(self.sinks, self.heads)

    @property
    def division(self) -> DivisionRule:
        if self.kv_heads == 1:
            return DivisionRule((self.q,), self.heads)
        return DivisionRule(self.reads, self.kv_heads, has_part=True)

    def portion(self, own: Units) -> Self:
        heads = own.of(self.heads)
        return replace(
            self,
            kv_heads=1 if self.kv_heads == 1 else len(own.of(self.kv_heads)),
            slopes=None if self.slopes is None else self.slopes[heads.start : heads.stop],
            sinks=None if self.sinks is None else shard_name(self.sinks, heads),
        )

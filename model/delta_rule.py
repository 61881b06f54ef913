"""Linear attention by the gated delta rule: its step, and the one that makes the decay of its state."""

from __future__ import annotations

from dataclasses import dataclass

from llamaclust.model.row_steps import Buffer
from llamaclust.model.states import MAX_STATE_FLOATS, SequenceState, StatePart

VALUE_CHANNELS = 16
"""Channels of a head's value are a multiple of it."""
MAX_HEADS = 1 << 10


def excess_of_heads(heads: int, channels: int) -> str | None:
    """What is wrong with so many heads of `channels` keys and values each, if their state is too large."""
    floats = heads * channels * channels
    if floats <= MAX_STATE_FLOATS:
        return None
    return f"{heads} heads of {channels} channels have a state of {floats} numbers, at most {MAX_STATE_FLOATS} expected"


@dataclass(frozen=True, slots=True)
class Decay:
    """out = exp(weight * softplus(x + bias)); out may be x.

    weight [heads], or [heads, 1] with a `column`: a number for each of the row's equal parts, which is negative in
    models; bias [x.width].
    """

    x: Buffer
    out: Buffer
    weight: str
    bias: str
    heads: int
    column: bool = False

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return (self.heads, 1) if self.column else (self.heads,)


@dataclass(frozen=True, slots=True)
class DeltaRule:
    """A state [key channels, value channels] for each head, which a row reads and updates:

    decayed = state * decay; delta = (v - decayed^T @ k) * beta; state' = decayed + k @ delta^T; out = state'^T @ q.

    q, k [rows, key_heads * key channels]; v, out [rows, heads * value channels]; beta [rows, heads]; decay [rows,
    heads], or [rows, heads * key channels]. Head h has key head h % key_heads where they are `tiled`, otherwise
    h // (heads / key_heads).
    """

    q: Buffer
    k: Buffer
    v: Buffer
    decay: Buffer
    beta: Buffer
    out: Buffer
    layer: int
    heads: int
    key_heads: int
    tiled: bool = False

    @property
    def shape(self) -> tuple[int, int, int]:
        """Heads, key channels and value channels of the state."""
        return self.heads, self.k.width // self.key_heads, self.v.width // self.heads

    @property
    def state(self) -> SequenceState:
        heads, keys, values = self.shape
        return SequenceState(self.layer, StatePart.RECURRENCE, heads * keys * values)

"""Steps that keep a state for each sequence, the states' layout in KV memory, and the decay of a state."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from math import prod

from llamaclust.model.steps.step import Buffer, StepFacts, StepWeight, UnaryStep, WeightKind, optional_weight

MAX_TAPS = 16
MAX_KEY_CHANNELS = 256
MAX_STATE_FLOATS = 1 << 26
"""The maximum number of floats in one state of a layer. All limits in this file are limits of the kernels."""
VALUE_CHANNELS = 16
"""A delta rule's values must have a multiple of this number of channels."""
MAX_HEADS = 1 << 10


class StatePart(Enum):
    CONVOLUTION = "convolution"
    CONVOLUTION_OF_KEYS = "convolution of keys"
    CONVOLUTION_OF_VALUES = "convolution of values"
    RECURRENCE = "recurrence"


@dataclass(frozen=True, slots=True)
class SequenceState:
    """A layer's state of a sequence: `floats` float32 numbers, which start at 0. Rows update the state in order."""

    layer: int
    part: StatePart
    floats: int

    @property
    def n_bytes(self) -> int:
        return 4 * self.floats


@dataclass(frozen=True, slots=True)
class Convolution(UnaryStep):
    """A causal convolution. out[r, c] = the sum over taps t of weight[c, t] * x[p + t - (taps - 1), c] (+ bias[c]). p
    is the position of row r in its sequence. x is 0 at negative positions. The state is the last taps - 1 rows of x.
    weight is [x.width, taps]. out must not alias x."""

    weight: str
    taps: int
    layer: int
    bias: str | None = None
    part: StatePart = StatePart.CONVOLUTION

    @property
    def state(self) -> SequenceState:
        return SequenceState(self.layer, self.part, (self.taps - 1) * self.x.width)

    @property
    def weights(self) -> tuple[StepWeight, ...]:
        weight = StepWeight(self.weight, (self.x.width, self.taps), WeightKind.MATRIX)
        return weight, *optional_weight(self.bias, self.x.width)


def excess_of_heads(heads: int, channels: int) -> str | None:
    floats = heads * channels * channels
    if floats <= MAX_STATE_FLOATS:
        return None
    return f"{heads} heads of {channels} channels have a state of {floats} numbers; the limit is {MAX_STATE_FLOATS}"


@dataclass(frozen=True, slots=True)
class Decay(UnaryStep):
    """out = exp(weight * softplus(x + bias)). weight [heads] is negative. bias is [x.width]. out may alias x."""

    weight: str
    bias: str
    heads: int

    @property
    def weights(self) -> tuple[StepWeight, ...]:
        return StepWeight(self.weight, (self.heads,)), StepWeight(self.bias, (self.x.width,))


@dataclass(frozen=True, slots=True)
class DeltaRule(StepFacts):
    """A gated delta rule. Each head has a state [key channels, value channels], which each row reads and updates:
    decayed = state * decay; delta = (v - decayed^T @ k) * beta; state' = decayed + k @ delta^T; out = state'^T @ q.
    q and k are [rows, key_heads * key channels]. v and out are [rows, heads * value channels]. beta is [rows, heads].
    decay is [rows, heads] or [rows, heads * key channels]. Head h has key head h % key_heads if `tiled`, and otherwise
    key head h // (heads / key_heads)."""

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
    def reads(self) -> tuple[Buffer, ...]:
        return self.q, self.k, self.v, self.decay, self.beta

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.heads, self.k.width // self.key_heads, self.v.width // self.heads

    @property
    def state(self) -> SequenceState:
        heads, keys, values = self.shape
        return SequenceState(self.layer, StatePart.RECURRENCE, heads * keys * values)

    @property
    def state_macs(self) -> int:
        return 4 * prod(self.shape)


@dataclass(frozen=True, slots=True)
class Scan(StepFacts):
    """Mamba 2's selective state space (Dao and Gu, 2024). Each head has a state [state size, channels]:
    step = ln(1 + exp(dt + bias)); state' = state * exp(step * decay) + b @ (x * step)^T; out = state'^T @ c + x * skip.
    x [rows, out.width + 2 * groups * state size] has the channels of all heads, then b of all groups, then c of all
    groups. Consecutive heads form a group. dt is [rows, heads]. bias is [heads]. decay (negative in models) and skip
    are [heads, 1]. out is [rows, heads * channels]."""

    x: Buffer
    dt: Buffer
    out: Buffer
    bias: str
    decay: str
    skip: str
    groups: int
    layer: int

    @property
    def reads(self) -> tuple[Buffer, ...]:
        return self.x, self.dt

    @property
    def weights(self) -> tuple[StepWeight, ...]:
        of_heads = (StepWeight(name, (self.heads, 1)) for name in (self.decay, self.skip))
        return StepWeight(self.bias, (self.heads,)), *of_heads

    @property
    def heads(self) -> int:
        return self.dt.width

    @property
    def state_size(self) -> int:
        return (self.x.width - self.out.width) // (2 * self.groups)

    @property
    def state(self) -> SequenceState:
        return SequenceState(self.layer, StatePart.RECURRENCE, self.out.width * self.state_size)

    @property
    def state_macs(self) -> int:
        return 3 * self.out.width * self.state_size

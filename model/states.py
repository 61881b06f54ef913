"""Steps that keep a state of each sequence, and what KV memory keeps for them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from llamaclust.model.row_steps import Buffer

MAX_TAPS = 16
"""Of a convolution."""
MAX_KEY_CHANNELS = 256
"""Of a head of a delta rule."""
MAX_STATE_FLOATS = 1 << 26
"""Of one state of a layer; like the other limits, what kernels have room for."""


class StatePart(Enum):
    """Which of a layer's states."""

    CONVOLUTION = "convolution"
    CONVOLUTION_OF_KEYS = "convolution of keys"
    CONVOLUTION_OF_VALUES = "convolution of values"
    RECURRENCE = "recurrence"


@dataclass(frozen=True, slots=True)
class SequenceState:
    """What a layer keeps of a sequence, updated by each row in order: `floats` float32 numbers, 0 at its beginning.
    A layer may have one of each part, and attention beside them.

    It lies in state blocks, each the state behind some position, which other sequences with the same tokens up to it
    may go on from; or, where there are none, in KV blocks: behind the last of a block's positions that are computed.
    """

    layer: int
    part: StatePart
    floats: int

    @property
    def n_bytes(self) -> int:
        return 4 * self.floats


@dataclass(frozen=True, slots=True)
class Convolution:
    """out[r, c] = the sum over taps t of weight[c, t] * x[p + t - (taps - 1), c] (+ bias[c]), for the row at position p
    and those before it in its sequence, 0 before its beginning; out is not x. The state is the last taps - 1 rows of x.

    weight [x.width, taps].
    """

    x: Buffer
    out: Buffer
    weight: str
    taps: int
    layer: int
    bias: str | None = None
    part: StatePart = StatePart.CONVOLUTION

    @property
    def state(self) -> SequenceState:
        return SequenceState(self.layer, self.part, (self.taps - 1) * self.x.width)

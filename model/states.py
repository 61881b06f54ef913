"""Steps that keep a state of each sequence, and what KV memory keeps for them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from llamaclust.model.kv_type import KV_BLOCK_TOKENS
from llamaclust.model.row_steps import Buffer

STATE_WINDOW = 2
"""Positions whose blocks rows of a state need, their own among them: a row updates what the row before it left."""


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

    Each KV block has a copy: behind the last of its positions that are computed. Rows read the one behind the position
    before them, so that sequences that share a block may go on from its end.
    """

    layer: int
    part: StatePart
    floats: int  # a multiple of KV_BLOCK_TOKENS

    @property
    def kv_token_bytes(self) -> int:
        """KV memory of one position, which is a share of its block's."""
        return 4 * self.floats // KV_BLOCK_TOKENS

    @property
    def window(self) -> int:
        return STATE_WINDOW


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

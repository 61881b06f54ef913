"""Mamba 2's selective state space: its step."""

from __future__ import annotations

from dataclasses import dataclass

from llamaclust.model.row_steps import Buffer
from llamaclust.model.states import SequenceState, StatePart


@dataclass(frozen=True, slots=True)
class Scan:
    """A state [state size, channels] for each head, which a row reads and updates (Dao and Gu, 2024):

    step = ln(1 + exp(dt + bias)); state' = state * exp(step * decay) + b @ (x * step)^T; out = state'^T @ c + x * skip.

    x [rows, out.width + 2 * groups * state size] has the channels of all heads, then b and then c of each group; heads
    are in equal groups, one after the other. dt [rows, heads]; bias [heads]; decay, which is negative in models, and
    skip [heads, 1]; out [rows, heads * channels].
    """

    x: Buffer
    dt: Buffer
    out: Buffer
    bias: str
    decay: str
    skip: str
    groups: int
    layer: int

    @property
    def heads(self) -> int:
        return self.dt.width

    @property
    def state_size(self) -> int:
        """Numbers for each channel."""
        return (self.x.width - self.out.width) // (2 * self.groups)

    @property
    def state(self) -> SequenceState:
        return SequenceState(self.layer, StatePart.RECURRENCE, self.out.width * self.state_size)

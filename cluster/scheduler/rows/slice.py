from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from llamaclust.core.sampler.tasks import RowTask
from llamaclust.wire.microbatch.messages import Chunk, Microbatch, SamplingInputs

if TYPE_CHECKING:
    from llamaclust.cluster.scheduler.sequences import Sequence


@dataclass(frozen=True, slots=True)
class SequenceSlice:
    """The rows of one sequence in a microbatch. The last `drafted` rows hold drafted tokens. A drafted row is valid
    only if the row before it chose the drafted token."""

    sequence: Sequence
    chunk: Chunk
    tasks: tuple[RowTask, ...]
    # Number of rows that choose a token, at the end of the chunk. All are drafted if an earlier window was in flight.
    sampled: int
    drafted: int = 0
    branch: int = 0  # Value of `Drafting.branch` when the rows were taken.
    draft_kind: str = ""  # Kind of drafter, see `kind_of`.

    @property
    def is_scored(self) -> bool:
        return len(self.tasks) > self.sampled

    @property
    def is_answered(self) -> bool:
        return bool(self.tasks) or self.chunk.embedded_rows > 0

    @property
    def is_stale(self) -> bool:
        return self.drafted > 0 and self.branch != self.sequence.drafting.branch

    @property
    def end(self) -> int:
        return self.chunk.position + len(self.chunk.tokens)


@dataclass(frozen=True, slots=True)
class ScheduledMicrobatch:
    microbatch: Microbatch
    inputs: SamplingInputs

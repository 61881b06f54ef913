"""A microbatch for the pipeline, and its slices. A slice has one sequence's rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from llamaclust.core.sampling import RowTask
from llamaclust.wire.microbatch.messages import Chunk, Microbatch, SamplingInputs

if TYPE_CHECKING:
    from llamaclust.cluster.scheduler.sequences import Sequence


@dataclass(frozen=True, slots=True)
class SequenceSlice:
    """One sequence's rows. Each of the last `drafted` rows counts only if the row before it chose the drafted token."""

    sequence: Sequence
    chunk: Chunk
    tasks: tuple[RowTask, ...]
    sampled: int  # rows that choose a token: the last ones; all are drafted where the window before was under way
    drafted: int = 0
    branch: int = 0  # `Drafting.branch` when the rows were taken
    draft_kind: str = ""  # see `kind_of`

    @property
    def is_scored(self) -> bool:
        return len(self.tasks) > self.sampled

    @property
    def is_answered(self) -> bool:
        return bool(self.tasks) or self.chunk.embedded_rows > 0

    @property
    def is_stale(self) -> bool:
        """True if the drafted rows no longer count, because the tokens before them have changed."""
        return self.drafted > 0 and self.branch != self.sequence.drafting.branch

    @property
    def end(self) -> int:
        return self.chunk.position + len(self.chunk.tokens)


@dataclass(frozen=True, slots=True)
class ScheduledMicrobatch:
    microbatch: Microbatch
    inputs: SamplingInputs

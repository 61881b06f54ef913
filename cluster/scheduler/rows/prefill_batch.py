from __future__ import annotations

from dataclasses import dataclass, field

from llamaclust.cluster.scheduler.kv.memory import KvMemory
from llamaclust.cluster.scheduler.rows.slice import SequenceSlice
from llamaclust.cluster.scheduler.rows.slicing import take_rows
from llamaclust.cluster.scheduler.sequences import Sequence

_MAX_STARTS = 32
"""Maximum number of matchers that start in one microbatch. A matcher is sent with its grammar, which may be large."""


@dataclass(slots=True)
class PrefillBatch:
    memory: KvMemory
    now_ns: int
    rows_left: int  # Rows that predicted times still allow. Rows that must be computed together may exceed this.
    room: int  # Number of rows that the microbatch can still hold.
    outputs_left: int
    scored_left: int
    embedded_left: int
    image_bytes_left: int
    starts_left: int = _MAX_STARTS
    slices: dict[int, SequenceSlice] = field(default_factory=dict)

    def add(self, sequence: Sequence, share: int = 1) -> bool:
        """Adds rows of the sequence, up to 1 / `share` of `rows_left`. Returns False if no row can be added."""
        is_scored = sequence.has_scores_left
        if sequence.lacks_matcher and not self.starts_left:
            return False
        outputs = min(self.outputs_left, self.scored_left) if is_scored else self.outputs_left
        outputs = self.embedded_left if sequence.request.embedded is not None else outputs
        outputs = -(-outputs // share)
        rows = sequence.rows_within(max(self.rows_left // share, min(1, self.rows_left)), outputs)
        if sequence.images is not None and rows > 0:
            most = sequence.rows_within(self.room, outputs)
            rows = sequence.images.fitting(sequence.scheduled, rows, most, self.image_bytes_left // share)
        if rows > 0 and sequence.key not in self.slices:
            sequence.usage.started(self.now_ns)
            self.memory.reserve(sequence, rows)
            taken = self.slices[sequence.key] = take_rows(sequence, rows)
            self.memory.filled(sequence)
            self.rows_left -= rows
            self.room -= rows
            self.image_bytes_left -= taken.chunk.image_bytes
            self.outputs_left -= len(taken.tasks)
            self.scored_left -= len(taken.tasks) if is_scored else 0
            self.embedded_left -= taken.chunk.embedded_rows
            self.starts_left -= sequence.lacks_matcher
        return rows > 0

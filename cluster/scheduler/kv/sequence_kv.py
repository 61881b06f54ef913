from __future__ import annotations

from dataclasses import dataclass, field

from llamaclust.cluster.scheduler.kv.blocks import BlockTable
from llamaclust.cluster.scheduler.kv.prefix_cache import BlockKeys


@dataclass(slots=True)
class SequenceStates:
    is_begun: bool = False  # True while the sequence runs and may hold state blocks.
    read: int | None = None  # Block with the state after the scheduled rows. None: no row is scheduled.
    # Block for the state after the next rows. It may equal `read`. No other sequence shares it.
    own: int | None = None
    # Checkpoints to write within the next rows, as (position, block).
    marks: list[tuple[int, int]] = field(default_factory=list)
    # Block for the state after drafted rows, used in place of `own` until the drafts are verified.
    ahead: int | None = None
    # Position of `read` if that block is a checkpoint whose last token is not known yet.
    unregistered: int | None = None

    def of_chunk(self, position: int, rows: int) -> tuple[int | None, tuple[int, ...]]:
        last = self.own if self.ahead is None else self.ahead
        if last is None:
            return None, ()
        ends = [(place - position, block) for place, block in self.marks] + [(rows, last)]
        return self.read, tuple(number for end in ends for number in end)

    def clear(self) -> set[int]:
        marks = (block for _, block in self.marks)
        held = {block for block in (self.read, self.own, self.ahead, *marks) if block is not None}
        self.is_begun, self.read, self.own, self.ahead, self.unregistered = False, None, None, None, None
        self.marks.clear()
        return held


@dataclass(slots=True)
class SequenceKv:
    keys: BlockKeys  # Prefix cache keys of the full blocks.
    table: BlockTable = field(default_factory=BlockTable)
    window: BlockTable = field(default_factory=BlockTable)
    states: SequenceStates = field(default_factory=SequenceStates)
    registered: int = 0  # Number of blocks in `table` that are registered in the prefix cache.

    def restart(self) -> None:
        self.table, self.window, self.states, self.registered = BlockTable(), BlockTable(), SequenceStates(), 0

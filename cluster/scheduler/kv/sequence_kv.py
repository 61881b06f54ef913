"""One sequence's KV memory: its blocks, and the keys by which other sequences find these blocks."""

from __future__ import annotations

from dataclasses import dataclass, field

from llamaclust.cluster.scheduler.kv.blocks import BlockTable
from llamaclust.cluster.scheduler.kv.prefix_cache import BlockKeys


@dataclass(slots=True)
class SequenceStates:
    is_begun: bool = False  # it runs, and may hold blocks
    read: int | None = None  # has the state behind the rows that are scheduled; None: there are none
    own: int | None = None  # gets the state behind the next rows; may be `read`, and is never shared
    marks: list[tuple[int, int]] = field(default_factory=list)  # (position, block): states behind some rows before
    ahead: int | None = None  # gets the state behind drafted rows instead, until it is known whether they count
    unregistered: int | None = None  # the position of `read` where that is a checkpoint whose last token is not known

    def of_chunk(self, position: int, rows: int) -> tuple[int | None, tuple[int, ...]]:
        """Returns `Chunk.state_from` and `Chunk.state_to` of the next rows."""
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
    keys: BlockKeys  # prefix cache keys of the tokens' full blocks
    table: BlockTable = field(default_factory=BlockTable)
    window: BlockTable = field(default_factory=BlockTable)
    states: SequenceStates = field(default_factory=SequenceStates)
    registered: int = 0  # blocks of the table that the prefix cache knows

    def restart(self) -> None:
        self.table, self.window, self.states, self.registered = BlockTable(), BlockTable(), SequenceStates(), 0

"""Stages as the planner takes them: what devices of a worker hold, and how long they compute."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from llamaclust.cluster.planner.costs import StageCosts, Table, WorkerFacts
from llamaclust.cluster.planner.devices import Held
from llamaclust.cluster.planner.groups.gathers import NO_GATHERS, GatherTimes
from llamaclust.model.groups.portion import Portion


@dataclass(frozen=True, slots=True)
class StageParts:
    """A stage of a worker: what its devices hold, one behind the other."""

    worker: str
    parts: tuple[Held, ...]
    costs: StageCosts  # of the model, or of a member's portion of it
    shares: tuple[int, ...] = ()  # see `StagePlan`
    member: int = 0

    @property
    def portion(self) -> Portion | None:
        """Of a group's member."""
        return Portion(self.shares, self.member) if self.shares else None

    @property
    def start(self) -> int:
        """Its first layer."""
        return min(part.start for part in self.parts)

    @property
    def end(self) -> int:
        """One past its last layer."""
        return max(part.end for part in self.parts)

    def decode_s(self, rows: int = 1, *, concurrent: bool = False) -> float:
        return sum(
            _held_s(self.costs, self.costs.decode_table, part, rows, concurrent=concurrent) for part in self.parts
        )

    def prefill_s(self, rows: int, *, concurrent: bool = False) -> float:
        return sum(
            _held_s(self.costs, self.costs.prefill_table, part, rows, concurrent=concurrent) for part in self.parts
        )


@dataclass(frozen=True, slots=True)
class HeldStage:
    """A stage as its workers hold it: one of them, or the members of a group, the leader first."""

    members: tuple[StageParts, ...]
    gathers: GatherTimes[float] = NO_GATHERS

    @property
    def leader(self) -> StageParts:
        """Stands for the stage in the chain."""
        return self.members[0]

    @property
    def _is_group(self) -> bool:
        """Its members compute at the same time, some perhaps on one machine."""
        return len(self.members) > 1

    def decode_s(self, rows: int = 1, *, concurrent: bool = False) -> float:
        """The slowest member, and the gathers, at which all of them meet."""
        return max(self.member_decode_s(rows, concurrent=concurrent))

    def prefill_s(self, rows: int, *, concurrent: bool = False) -> float:
        return max(self.member_prefill_s(rows, concurrent=concurrent))

    def member_decode_s(self, rows: int = 1, *, concurrent: bool = False) -> list[float]:
        """What each member takes, if none waits for another one."""
        gathers_s, concurrent = self.gathers.decode_s(rows), concurrent or self._is_group
        return [member.decode_s(rows, concurrent=concurrent) + gathers_s for member in self.members]

    def member_prefill_s(self, rows: int, *, concurrent: bool = False) -> list[float]:
        """Likewise."""
        concurrent = concurrent or self._is_group
        computing = [member.prefill_s(rows, concurrent=concurrent) for member in self.members]
        return [seconds + float(self.gathers.prefill_s(rows, seconds)) for seconds in computing]


class _StepTable(Protocol):
    def __call__(self, worker: WorkerFacts, rows: int, *, concurrent: bool = False) -> Table: ...


def _held_s(costs: StageCosts, table: _StepTable, held: Held, rows: int, *, concurrent: bool) -> float:
    """What a device takes for its layers, or for experts of layers on a GPU with their way there and back."""
    start, end, moved = held.start, held.end, np.isin(np.arange(costs.layers), held.cpu_moe)
    experts = costs.experts_table(held.device, rows, moved, concurrent=concurrent)[start, end] if held.cpu_moe else 0.0
    if held.is_experts:
        return float(experts + costs.exchange_table(rows, moved)[start, end])
    return float(table(held.device, rows, concurrent=concurrent)[start, end] - experts)

"""A stage as the planner sees it: the layers on each device of its workers, and the time to compute them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from llamaclust.cluster.planner.costs import StageCosts, Table, WorkerFacts
from llamaclust.cluster.planner.devices import PlannedLayers
from llamaclust.cluster.planner.gathers import NO_GATHERS, GatherTimes, GroupLinks, gather_times
from llamaclust.cluster.planner.links import Links
from llamaclust.cluster.planner.manual import Assignment
from llamaclust.model.groups.costs import GroupCosts
from llamaclust.model.groups.portion import Portion

GroupCostsOf = Callable[[int], GroupCosts]
"""Returns the costs of a model for groups with this number of members. Must cache its results."""
HeldOf = Callable[[str, StageCosts, Portion], tuple[PlannedLayers, ...]]
"""Returns the layers of a worker by device. Arguments: the worker's name, the costs of its portion, and the portion."""


@dataclass(frozen=True, slots=True)
class StageParts:
    """The layers that one worker computes, device by device."""

    worker: str
    parts: tuple[PlannedLayers, ...]
    costs: StageCosts  # Costs of the model, or of a member's portion of the model.
    shares: tuple[int, ...] = ()  # See `StagePlan.shares`.
    member: int = 0

    @property
    def portion(self) -> Portion | None:
        return Portion(self.shares, self.member) if self.shares else None

    @property
    def start(self) -> int:
        return min(part.start for part in self.parts)

    @property
    def end(self) -> int:
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
    members: tuple[StageParts, ...]
    gathers: GatherTimes[float] = NO_GATHERS

    @property
    def leader(self) -> StageParts:
        return self.members[0]

    @property
    def _is_group(self) -> bool:
        return len(self.members) > 1

    def decode_s(self, rows: int = 1, *, concurrent: bool = False) -> float:
        return max(self.member_decode_s(rows, concurrent=concurrent))

    def prefill_s(self, rows: int, *, concurrent: bool = False) -> float:
        return max(self.member_prefill_s(rows, concurrent=concurrent))

    def member_decode_s(self, rows: int = 1, *, concurrent: bool = False) -> list[float]:
        """Returns the seconds of a decode step for each group member, as if no member waited for another."""
        gathers_s, concurrent = self.gathers.decode_s(rows), concurrent or self._is_group
        return [member.decode_s(rows, concurrent=concurrent) + gathers_s for member in self.members]

    def member_prefill_s(self, rows: int, *, concurrent: bool = False) -> list[float]:
        concurrent = concurrent or self._is_group
        computing = [member.prefill_s(rows, concurrent=concurrent) for member in self.members]
        return [seconds + float(self.gathers.prefill_s(rows, seconds)) for seconds in computing]


def held_by_group(entry: Assignment, held_of: HeldOf, costs_of: GroupCostsOf, links: Links) -> HeldStage:
    shares, costs = entry.shares, costs_of(len(entry.shares))
    members = (costs.member(shares, member) for member in range(len(shares)))
    portions = [StageCosts.of(own, own.head_bytes / max(costs.model.head_bytes, 1)) for own in members]
    return HeldStage(
        tuple(
            StageParts(name, held_of(name, portion, Portion(shares, member)), portion, shares, member)
            for member, (name, portion) in enumerate(zip(entry.workers, portions, strict=True))
        ),
        gather_times(costs, shares, entry.start, entry.end, GroupLinks.of(links, entry.workers)),
    )


class _StepTable(Protocol):
    def __call__(self, worker: WorkerFacts, rows: int, *, concurrent: bool = False) -> Table: ...


def _held_s(costs: StageCosts, table: _StepTable, held: PlannedLayers, rows: int, *, concurrent: bool) -> float:
    start, end, moved = held.start, held.end, np.isin(np.arange(costs.layers), held.cpu_moe)
    experts = costs.experts_table(held.device, rows, moved, concurrent=concurrent)[start, end] if held.cpu_moe else 0.0
    if held.is_experts:
        return float(experts + costs.exchange_table(rows, moved)[start, end])
    return float(table(held.device, rows, concurrent=concurrent)[start, end] - experts)

"""What each worker of an assignment holds: of a group, each member its portion."""

from __future__ import annotations

from collections.abc import Callable

from llamaclust.cluster.planner.costs import StageCosts
from llamaclust.cluster.planner.devices import Held
from llamaclust.cluster.planner.groups.gathers import GroupLinks, gather_times
from llamaclust.cluster.planner.links import Links
from llamaclust.cluster.planner.manual import Assignment
from llamaclust.cluster.planner.stage_parts import HeldStage, StageParts
from llamaclust.model.groups.costs import GroupCosts
from llamaclust.model.groups.portion import Portion

GroupCostsOf = Callable[[int], GroupCosts]
"""Costs of a model in groups of so many members. It is to remember."""


HeldOf = Callable[[str, StageCosts, Portion], tuple[Held, ...]]
"""Which devices of a worker hold which layers of a stage, by the costs of its portion."""


def held_by_group(entry: Assignment, held_of: HeldOf, costs_of: GroupCostsOf, links: Links) -> HeldStage:
    """The stage of a group."""
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

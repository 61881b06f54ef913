"""What each worker of an assignment holds: of a group, each member its portion."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from llamaclust.cluster.planner.costs import StageCosts, WorkerFacts
from llamaclust.cluster.planner.devices import Held
from llamaclust.cluster.planner.groups.gathers import GatherTimes, GroupLinks
from llamaclust.cluster.planner.links import Links
from llamaclust.cluster.planner.manual import Assignment
from llamaclust.cluster.planner.stage_parts import HeldStage, StageParts
from llamaclust.model.groups.costs import GroupCosts

GroupCostsOf = Callable[[int], GroupCosts]
"""Costs of a model in groups of so many members. It is to remember."""


def held_by_group(
    entry: Assignment, workers: Mapping[str, WorkerFacts], costs_of: GroupCostsOf, links: Links
) -> HeldStage:
    """The stage of a group whose workers compute on their processors."""
    shares, costs = entry.shares, costs_of(len(entry.shares))
    members = (costs.member(shares, member) for member in range(len(shares)))
    return HeldStage(
        tuple(
            StageParts(
                name,
                (Held(workers[name], entry.start, entry.end),),
                StageCosts.of(own, own.head_bytes / max(costs.model.head_bytes, 1)),
                shares,
                member,
            )
            for member, (name, own) in enumerate(zip(entry.workers, members, strict=True))
        ),
        GatherTimes.of(costs, shares, entry.start, entry.end, GroupLinks.of(links, entry.workers)),
    )

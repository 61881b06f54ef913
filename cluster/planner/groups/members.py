"""What each worker of an assignment holds: of a group, each member its portion."""

from __future__ import annotations

from collections.abc import Mapping

from llamaclust.cluster.planner.costs import StageCosts, WorkerFacts
from llamaclust.cluster.planner.devices import Held
from llamaclust.cluster.planner.groups.portions import portion
from llamaclust.cluster.planner.manual import Assignment
from llamaclust.cluster.planner.memory import MemoryModel
from llamaclust.cluster.planner.stage_parts import StageParts


def held_stages(
    sizes: MemoryModel, entry: Assignment, workers: Mapping[str, WorkerFacts], contexts: int
) -> tuple[StageParts, ...]:
    """One entry for each worker, of a group the leader first. `contexts`: see `MemoryModel.held`."""
    start, end = entry.start, entry.end
    if not entry.shares:
        (name,) = entry.workers
        return (StageParts(name, sizes.held(workers[name], start, end, contexts), sizes.stages),)
    return tuple(
        StageParts(
            name,
            (Held(workers[name], start, end),),
            StageCosts.of(portion(sizes.stages.model, entry.shares, member)),
            entry.shares,
            member,
        )
        for member, name in enumerate(entry.workers)
    )

"""Adjusts a group's shares if memory is nearly full."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import inf

import numpy as np

from llamaclust.cluster.planner.costs import StageCosts, WorkerFacts
from llamaclust.cluster.planner.devices import PlannedLayers
from llamaclust.cluster.planner.groups.shares import MANY, in_total
from llamaclust.cluster.planner.manual import Assignment
from llamaclust.cluster.planner.memory import MemoryModel
from llamaclust.cluster.planner.stage_parts import GroupCostsOf
from llamaclust.model.groups.portion import Portion

_MOVES = 100


def fitted(sizes: MemoryModel, entry: Assignment, workers: Mapping[str, WorkerFacts], contexts: int) -> Assignment:
    """Moves shares from the member with the least free memory to the member with the most, until KV memory for
    `contexts` full-length sequences fits. Returns `entry` unchanged if it never fits."""
    costs_of, shares = sizes.request.group_costs, entry.shares
    if not shares or costs_of is None:
        return entry
    for _ in range(_MOVES):
        lacking = [_lacking_bytes(sizes, costs_of, entry, shares, workers[name], contexts) for name in entry.workers]
        if max(lacking) <= 0:
            return replace(entry, shares=shares)
        moved = [*(in_total(shares, MANY) if shares is entry.shares else shares)]
        moved[int(np.argmax(lacking))] -= 1
        moved[int(np.argmin(lacking))] += 1
        shares = tuple(moved)
        if min(shares) < 1:
            break
    return entry


def _lacking_bytes(
    sizes: MemoryModel,
    costs_of: GroupCostsOf,
    entry: Assignment,
    shares: tuple[int, ...],
    worker: WorkerFacts,
    contexts: int,
) -> float:
    if worker.memory_bytes is None:
        return -inf
    member = entry.workers.index(worker.name)
    costs = StageCosts.of(costs_of(len(shares)).member(shares, member))
    # `entry.shares` gives the workspace of the original shares, because the workspace changes little.
    own = sizes.of(costs, Portion(entry.shares, member))
    return sum(own.parts(PlannedLayers(worker, entry.start, entry.end), contexts).values()) - worker.memory_bytes

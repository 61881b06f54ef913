from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations, product
from math import inf, prod

import numpy as np

from llamaclust.cluster.planner.costs import Table, WorkerFacts
from llamaclust.cluster.planner.gathers import GroupLinks
from llamaclust.cluster.planner.groups.bounds import LayerBounds
from llamaclust.cluster.planner.groups.tables import GroupTable, GroupTables
from llamaclust.cluster.planner.links import Link
from llamaclust.cluster.planner.memory import MemoryModel
from llamaclust.cluster.planner.splits.dynamic_program import (
    Counts,
    Partitions,
    Places,
    Steps,
    any_order,
    constrained_ends,
    in_order,
)
from llamaclust.cluster.planner.splits.holders import Holder, StageTable, WorkerClass
from llamaclust.cluster.planner.splits.orders import class_numbers
from llamaclust.cluster.planner.splits.search import CLOSE, Best, SplitSearch, best_of
from llamaclust.cluster.planner.splits.stage_tables import link_table
from llamaclust.cluster.planner.work import Work

_MOST_STEPS = 3**8
"""Maximum number of search steps for which all sets of workers are tried. Eight different workers need this number."""
_SIZES = (1, 2, 3, 4, 6, 8, 12, 16)
_MIN_GAIN_PER_MEMBER = 1e-3
"""Minimum fraction of the time that each member of a group must save."""
_TRIED_LIMITS = 512
"""Number of limits for the slowest stage's time that are tried."""
_MAX_CORRECTIONS = 6
_TOLERANCE = 1.01
"""A group's table is corrected if whole-number shares are slower than this factor times its prediction."""
_AT_LEAST = 0.97
"""A lower bound is multiplied by this factor, because the relative costs of layers differ between workers."""
_NEVER_S = 1e300


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    members: tuple[int, ...]
    search: GroupSearch

    def table(self, work: int) -> StageTable:
        return self.search.table(self.members, work)

    def shares(self, start: int, end: int, work: int) -> tuple[int, ...]:
        return self.search.costs_of(self.members).integer_shares(start, end, self.search.works[work])[0]

    def takes_longer(self, start: int, end: int, work: int) -> bool:
        """Corrects the table and returns True if whole-number shares take longer than the table predicts."""
        costs = self.search.costs_of(self.members)
        factor = costs.integer_shares(start, end, self.search.works[work])[1]
        is_longer = _TOLERANCE * costs.factor < factor < inf
        if is_longer:
            costs.factor = factor
        return is_longer


@dataclass(eq=False)
class GroupSearch:
    sizes: MemoryModel
    workers: Sequence[WorkerFacts]
    classes: Sequence[WorkerClass]
    works: Sequence[Work]
    tables: GroupTables
    partitions: Partitions
    ungrouped: Partitions  # Pairs of workers that must not be in one group.
    holders: list[Holder] = field(default_factory=list, init=False)
    _numbers: dict[tuple[int, ...], int | None] = field(default_factory=dict, init=False)
    _costs: dict[tuple[int, ...], GroupTable] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self.holders.extend(self.classes)

    def best(self, below: float, known: Best | None) -> Best | None:
        """Returns the best split faster than `below` seconds, or None. `known` is the best split without groups."""
        best = None
        for _ in range(_MAX_CORRECTIONS):
            best = self._best(below, known)
            if best is None or not self._takes_longer(best):
                break
        return best

    def _takes_longer(self, best: Best) -> bool:
        stages = ((self.holders[number], start, end) for number, start, end in best.split.stages)
        work = best.work
        longer = [holder.takes_longer(start, end, work) for holder, start, end in stages if isinstance(holder, Group)]
        return any(longer)

    def _best(self, below: float, known: Best | None) -> Best | None:
        neighbours, others = self._places()
        if len(self.holders) == len(self.classes):
            return None
        works = range(len(self.works))
        best = best_of([[self._search(number, places) for places in neighbours for number in works]], below)
        numbers = {best.work} if best is not None else {0, known.work if known is not None else 0}
        limit = below if best is None else CLOSE * best.seconds
        searches = [self._search(number, places) for places in others for number in sorted(numbers)]
        return best_of([searches], limit) or best

    def _search(self, number: int, places: Places) -> SplitSearch:
        work, ends = self.works[number], constrained_ends(range(len(self.workers)), self.partitions)
        limits, least = np.array([inf]), 0.0
        if work.slowest:
            slow = [*self._slow_s(number)]
            least = _AT_LEAST / sum(1 / each for each in slow)
            limits = np.array([*np.geomspace(least, 2 * max(slow), _TRIED_LIMITS), inf])
        return SplitSearch(Steps(places, self.holders, number, ends, self._bounds(number)), work, limits, least)

    def _slow_s(self, number: int) -> Iterator[float]:
        stages = self.sizes.stages
        for worker, found in enumerate(self.workers):
            on_processor = sum(
                step.steps
                * (stages.prefill_s if step.is_prompt else stages.decode_s)(found, 0, stages.layers, step.rows)
                for step in self.works[number].slowest
            )
            table = self.classes[self._class_numbers[worker]].table(number)
            yield min(on_processor, stages.layers * _of_layer(table.slow))

    def _bounds(self, number: int) -> LayerBounds:
        links = [
            self.sizes.request.links.between(*pair) for pair in combinations([one.name for one in self.workers], 2)
        ]
        work = self.works[number]
        least = Link(
            min(link.one_way_s for link in links),
            min(link.byte_s for link in links),
            min(link.gather_s for link in links),
        )
        return LayerBounds.of(
            [one.table(number).total for one in self.classes], self.tables.least_gathers_s(work, least)
        )

    def _places(self) -> tuple[list[Places], list[Places]]:
        order = [worker for worker_class in self.classes for worker in worker_class.workers]
        by_speed = tuple(sorted(order, key=self._token_s.__getitem__))
        by_memory = tuple(sorted(order, key=self._memory))
        sizes = tuple(len(worker_class.workers) for worker_class in self.classes)
        if prod((size + 1) * (size + 2) // 2 for size in sizes) <= _MOST_STEPS:
            return [self._neighbours(by_speed)], [self._any_sets(sizes)]
        return [self._neighbours(one) for one in dict.fromkeys((by_speed, tuple(sorted(order)), by_memory))], []

    def _neighbours(self, order: Sequence[int]) -> Places:
        return in_order(order, _SIZES, self._number, lambda number: self.holders[number].members[0], self.partitions)

    def _any_sets(self, sizes: Counts) -> Places:
        held_by = sorted(
            (counts for counts in product(*(range(size + 1) for size in sizes)) if sum(counts) == 1), reverse=True
        )
        numbers = {counts: number for number, counts in enumerate(held_by)}  # Each class keeps its number.
        for counts in product(*(range(size + 1) for size in sizes)):
            number = self._number(self._first_of(counts)) if sum(counts) > 1 else None
            if number is not None:
                numbers[counts] = number
        leaders = tuple(holder.members[0] for holder in self.holders)
        return any_order(sizes, tuple(numbers.items()), leaders, self.partitions)

    def _first_of(self, counts: Counts) -> tuple[int, ...]:
        chosen = zip(counts, self.classes, strict=True)
        return tuple(worker for count, worker_class in chosen for worker in worker_class.workers[:count])

    def _number(self, members: tuple[int, ...]) -> int | None:
        if len(members) == 1:
            return self._class_numbers[members[0]]
        key = tuple(sorted(members, key=self._rank.__getitem__))
        if key not in self._numbers:
            is_possible = self._may_hold(key)
            self._numbers[key] = len(self.holders) if is_possible else None
            if is_possible:
                self.holders.append(Group(key, self))
        return self._numbers[key]

    def _may_hold(self, members: tuple[int, ...]) -> bool:
        request, facts = self.sizes.request, [self.workers[member] for member in members]
        if len(members) > request.largest_group or not all(worker.joins_groups for worker in facts):
            return False
        if any(pair <= {*members} for pair in self.ungrouped):
            return False
        if not request.links.are_known([each.name for each in facts]):
            return False
        links = self.costs_of(members).links
        gathers_s = self.tables.gathers_of(len(members)) * links.gather_s
        return gathers_s < max(self._token_s[member] for member in members)

    @cached_property
    def _class_numbers(self) -> dict[int, int]:
        return class_numbers(self.classes)

    @cached_property
    def _token_s(self) -> list[float]:
        stages = self.sizes.stages
        return [stages.decode_s(worker, 0, stages.layers) for worker in self.workers]

    @cached_property
    def _rank(self) -> dict[int, tuple[bool, float, int]]:
        """Sort keys for the choice of a leader. Prefers workers that reach all others, and then faster workers."""
        bound = frozenset[int]().union(*self.partitions)
        return {worker: (worker in bound, seconds, worker) for worker, seconds in enumerate(self._token_s)}

    def _memory(self, worker: int) -> float:
        memory_bytes = self.workers[worker].memory_bytes
        return -inf if memory_bytes is None else -float(memory_bytes)

    def costs_of(self, members: tuple[int, ...]) -> GroupTable:
        if members not in self._costs:
            facts = [self.workers[member] for member in members]
            links = GroupLinks.of(self.sizes.request.links, [each.name for each in facts])
            self._costs[members] = self.tables.of(facts, links)
        return self._costs[members]

    def table(self, members: tuple[int, ...], work: int) -> StageTable:
        own = self.costs_of(members).of_work(self.works[work])
        links = link_table(self.sizes, self.works[work], self.workers[members[0]].reach)
        token_s = 1 / sum(1 / max(seconds, 1e-9) for seconds in self._token_s)
        steps = sum(step.steps for step in self.works[work].each)
        return StageTable(
            np.maximum(own.slow, links.slow),
            own.total + links.total + _MIN_GAIN_PER_MEMBER * len(members) * steps * token_s,
        )


def _of_layer(costs: Table) -> float:
    places = np.arange(len(costs))
    lengths = places - places[:, np.newaxis]
    return max(float((costs[lengths > 0] / lengths[lengths > 0]).min()), 1e-12)

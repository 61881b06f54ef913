"""The best chain whose stages are workers or groups: over all sets of workers where these are few, or fall into few
classes; else over neighbours in likely orders."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import inf, prod

import numpy as np

from llamaclust.cluster.planner.costs import WorkerFacts
from llamaclust.cluster.planner.groups.gathers import GroupLinks
from llamaclust.cluster.planner.groups.tables import GroupTable, GroupTables
from llamaclust.cluster.planner.links import Links
from llamaclust.cluster.planner.manual import Assignment
from llamaclust.cluster.planner.memory import MemoryModel
from llamaclust.cluster.planner.splits.dynamic_program import Choice, Split, Step, Steps
from llamaclust.cluster.planner.splits.search import Aim, best_of, stage_limits
from llamaclust.cluster.planner.splits.worker_classes import WorkerClass
from llamaclust.cluster.planner.stage_tables import link_tables

_MOST_STEPS = 3**8
"""All sets are tried where that takes no more steps than with eight workers that are all different."""
_SIZES = (1, 2, 3, 4, 6, 8, 12, 16)
"""Of groups where there are more workers."""
_MEMBER = 1e-3
"""Each member of a group has to make a token faster by so much of the least time that it could take."""

Counts = tuple[int, ...]
"""How many workers of each class."""


@dataclass(frozen=True, slots=True)
class GroupSplit:
    """A split with a group at least, what it takes by tables, and whether none can be better."""

    entries: tuple[Assignment, ...]
    split: Split
    is_best: bool


@dataclass(slots=True, eq=False)
class _Element:
    """What a stage may be held by."""

    members: tuple[int, ...]  # by place in the file; of classes, the first ones that are equal
    costs: WorkerClass
    table: GroupTable | None  # None: one worker


@dataclass(eq=False)
class GroupSearch:
    """`classes`: of all `workers`, each with the tables of its stages."""

    sizes: MemoryModel
    workers: Sequence[WorkerFacts]
    classes: Sequence[WorkerClass]
    tables: GroupTables
    links: Links
    largest: int
    _elements: list[_Element] = field(default_factory=list, init=False)
    _known: dict[tuple[int, ...], int | None] = field(default_factory=dict, init=False)
    _token_s: list[float] = field(default_factory=list, init=False)  # of all layers, if memory would suffice

    def __post_init__(self) -> None:
        stages = self.sizes.stages
        self._token_s = [stages.decode_s(worker, 0, stages.layers) for worker in self.workers]

    def best(self, *, limit: float | None) -> GroupSplit | None:
        """The split with the least time of a token; or with a `limit`, with the fastest slowest stage, which is within
        it. None where there is none, or it has no group."""
        ways, is_complete = self._ways()
        found: Split | None = None
        for way in ways:
            split = way.least(inf if limit is None else limit)
            if split is not None and limit is not None:
                limits = stage_limits([element.costs for element in self._elements])
                split = best_of(way, limits[limits <= limit], Aim())
            if split is not None and (found is None or self._score(split, limit) < self._score(found, limit)):
                found = split
        if found is None or all(self._elements[number].table is None for number, _, _ in found.stages):
            return None
        return GroupSplit(tuple(self._entries(found)), found, is_complete)

    @staticmethod
    def _score(split: Split, limit: float | None) -> float:
        return split.total if limit is None else split.slowest

    def _ways(self) -> tuple[list[Steps], bool]:
        sizes = [len(worker_class.workers) for worker_class in self.classes]
        if prod((size + 1) * (size + 2) // 2 for size in sizes) <= _MOST_STEPS:
            return [Steps(self._any_sets(sizes))], True
        order = [worker for worker_class in self.classes for worker in worker_class.workers]
        by_speed = sorted(order, key=self._token_s.__getitem__)
        orders = dict.fromkeys((tuple(by_speed), tuple(sorted(order)), tuple(sorted(order, key=self._memory))))
        return [Steps(self._neighbours(one)) for one in orders], False

    def _any_sets(self, sizes: Sequence[int]) -> list[Step | Choice]:
        """A step for each set of workers used so far and each set of these that holds the last stage."""
        places: list[Step | Choice] = []
        choices: dict[Counts, tuple[int, ...]] = {}
        for used in np.ndindex(*(size + 1 for size in sizes)):
            first = len(places)
            for last in np.ndindex(*(count + 1 for count in used)):
                before = tuple(count - more for count, more in zip(used, last, strict=True))
                number = self._element(self._first_of(last)) if any(last) else None
                if number is not None and (not any(before) or choices[before]):
                    costs = self._elements[number].costs
                    places.append(Step(number, costs, choices[before], is_first=not any(before)))
            steps = tuple(range(first, len(places)))
            if steps:
                places.append(Choice(steps))
            choices[used] = (len(places) - 1,) if steps else ()
        return places

    def _first_of(self, counts: Counts) -> tuple[int, ...]:
        chosen = zip(counts, self.classes, strict=True)
        return tuple(worker for count, worker_class in chosen for worker in worker_class.workers[:count])

    def _neighbours(self, order: Sequence[int]) -> list[Step | Choice]:
        """Stages are of workers that follow each other in the order; any may be unused."""
        places: list[Step | Choice] = []
        choices: list[tuple[int, ...]] = [()]
        for end in range(1, len(order) + 1):
            steps = []
            for size in (size for size in _SIZES if size <= end):
                number = self._element(tuple(order[end - size : end]))
                if number is not None:
                    places.append(Step(number, self._elements[number].costs, choices[end - size], is_first=True))
                    steps.append(len(places) - 1)
            places.append(Choice((*choices[-1], *steps)))
            choices.append((len(places) - 1,))
        return places

    def _element(self, members: tuple[int, ...]) -> int | None:
        """Its number; None where these workers cannot hold a stage together."""
        key = tuple(sorted(members))
        if key not in self._known:
            element = self._made(key)
            self._known[key] = None if element is None else len(self._elements)
            if element is not None:
                self._elements.append(element)
        return self._known[key]

    @property
    def _least_token_s(self) -> float:
        """If all workers together took a part of it by their speeds, and no gather anything."""
        return 1 / sum(1 / max(seconds, 1e-9) for seconds in self._token_s)

    def _made(self, members: tuple[int, ...]) -> _Element | None:
        if len(members) == 1:
            return _Element(members, self._class_of(members[0]), None)
        facts = [self.workers[member] for member in members]
        if len(members) > self.largest or not all(worker.joins_groups for worker in facts):
            return None
        names = [worker.name for worker in facts]
        if not self.links.are_known(names):
            return None
        members = tuple(sorted(members, key=self._token_s.__getitem__))
        facts = [self.workers[member] for member in members]
        table = self.tables.of(facts, GroupLinks.of(self.links, [worker.name for worker in facts]))
        if table is None or not np.isfinite(table.token).any():
            return None
        sent_s, hops_s = link_tables(self.sizes, facts[0].reach)
        token = table.token + hops_s + _MEMBER * len(members) * self._least_token_s
        return _Element(members, WorkerClass(members[:1], np.maximum(table.mix, sent_s), token), table)

    def _class_of(self, worker: int) -> WorkerClass:
        return next(worker_class for worker_class in self.classes if worker in worker_class.workers)

    def _memory(self, worker: int) -> float:
        memory_bytes = self.workers[worker].memory_bytes
        return -inf if memory_bytes is None else -float(memory_bytes)

    def _entries(self, split: Split) -> Iterator[Assignment]:
        """Workers of a class stand for each other: none is used twice."""
        left = {id(worker_class): list(worker_class.workers) for worker_class in self.classes}
        for number, start, end in split.stages:
            element = self._elements[number]
            names = tuple(self.workers[left[id(self._class_of(member))].pop(0)].name for member in element.members)
            shares = () if element.table is None else element.table.integer_shares(start, end)
            yield Assignment(names, start, end, shares)

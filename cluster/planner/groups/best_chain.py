from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

from llamaclust.cluster.planner.chain import Chain, is_measured
from llamaclust.cluster.planner.costs import WorkerFacts
from llamaclust.cluster.planner.groups.fitting import fitted
from llamaclust.cluster.planner.groups.search import Group, GroupSearch
from llamaclust.cluster.planner.groups.tables import GroupTables
from llamaclust.cluster.planner.groups.worker_links import split_by_links
from llamaclust.cluster.planner.links import Pairs
from llamaclust.cluster.planner.manual import Assignment
from llamaclust.cluster.planner.memory import MemoryModel
from llamaclust.cluster.planner.plan import usual_prompt_tokens
from llamaclust.cluster.planner.splits.bounds import least_seconds
from llamaclust.cluster.planner.splits.dynamic_program import Partitions
from llamaclust.cluster.planner.splits.holders import WorkerClass, worker_classes
from llamaclust.cluster.planner.splits.orders import class_numbers, is_exact, worker_searches
from llamaclust.cluster.planner.splits.search import CLEARLY_BETTER, Best, SplitSearch, best_of
from llamaclust.cluster.planner.splits.stage_tables import stage_tables
from llamaclust.cluster.planner.work import Work, works_of

_WORTH_ROOM = 1.1
"""A plan whose KV memory holds fewer full-length sequences is chosen only if it is faster by this factor."""


@dataclass(frozen=True, slots=True)
class Found:
    entries: tuple[Assignment, ...]
    contexts: int  # Number of full-length sequences that fit into KV memory.
    seconds: float = 0.0  # Seconds that the objective minimizes.
    optimality_gap: float | None = None  # See `Plan.optimality_gap`.
    single: Found | None = None  # Best chain without groups, if this chain has groups.

    @property
    def has_groups(self) -> bool:
        return any(entry.shares for entry in self.entries)


def best_chain(sizes: MemoryModel, workers: Sequence[WorkerFacts], contexts: Sequence[int]) -> Found | None:
    """Returns the best chain of stages for the objective, or None if the model does not fit. Tries to reserve KV
    memory for each number of full-length sequences in `contexts`, and prefers the first number."""
    works = works_of(sizes.request.objective, usual_prompt_tokens(sizes.request.context_length))
    unlike = frozenset[str]().union(*sizes.request.ungrouped)
    found: Found | None = None
    before: list[WorkerClass] = []
    for count in contexts:
        classes = worker_classes(workers, partial(stage_tables, sizes, count, works), unlike)
        if found is not None and all(map(WorkerClass.costs_as, classes, before)):
            break  # Memory does not limit the plan, so the result would be the same.
        before = classes
        below = float("inf") if found is None else found.seconds / _WORTH_ROOM
        new = _Search(sizes, workers, classes, works, count).found(below)
        if new is not None and new.has_groups and new.single is None and found is not None:
            new = replace(new, single=found.single if found.has_groups else found)
        found = new or found
    return found


@dataclass(frozen=True, slots=True)
class _Search:
    sizes: MemoryModel
    workers: Sequence[WorkerFacts]
    classes: Sequence[WorkerClass]
    works: Sequence[Work]
    contexts: int

    def found(self, below: float) -> Found | None:
        best = best_of(self._single(), below)
        single = None if best is None else self._of(best)
        limit = below if best is None else CLEARLY_BETTER * best.seconds
        for allow_unrounded in (False, True):
            grouped = self._grouped(limit, best, allow_unrounded=allow_unrounded)
            if grouped is not None and (found := self._fitted(self._of(grouped))) is not None:
                return replace(found, single=single)
            if grouped is None and single is not None:
                break
        if single is None or is_exact(self.classes, self._partitions):
            return single
        return replace(single, optimality_gap=single.seconds / least_seconds(self.classes, self.works) - 1)

    def _of(self, best: Best) -> Found:
        return Found(self._entries(best), self.contexts, best.seconds)

    @property
    def _partitions(self) -> Partitions:
        return self._places(self.sizes.request.partitions)

    def _places(self, pairs: Pairs) -> Partitions:
        places = {worker.name: place for place, worker in enumerate(self.workers)}
        return frozenset(frozenset(places[name] for name in pair) for pair in pairs if pair <= places.keys())

    def _single(self) -> Iterator[Sequence[SplitSearch]]:
        return worker_searches(self.classes, self.works, self._partitions)

    def _grouped(self, below: float, known: Best | None, *, allow_unrounded: bool) -> Best | None:
        request = self.sizes.request
        if request.largest_group < 2 or request.group_costs is None or not is_measured(self.workers):
            return None
        classes = [part for one in self.classes for part in split_by_links(one, self.workers, request.links)]
        tables = GroupTables(self.sizes, request.group_costs, self.contexts, allow_unrounded)
        apart = self._places(request.ungrouped)
        search = GroupSearch(self.sizes, self.workers, classes, self.works, tables, self._partitions, apart)
        return search.best(below, known)

    def _fitted(self, found: Found) -> Found | None:
        by_name = {worker.name: worker for worker in self.workers}
        entries = tuple(fitted(self.sizes, entry, by_name, self.contexts) for entry in found.entries)
        blocks = Chain.of(self.sizes, entries, by_name, self.contexts).kv_blocks
        return replace(found, entries=entries) if blocks >= self.sizes.request.context_blocks else None

    def _entries(self, best: Best) -> tuple[Assignment, ...]:
        holders, work = best.search.steps.holders, best.work
        classes = [holder for holder in holders if isinstance(holder, WorkerClass)]
        numbers, left = class_numbers(classes), [list(one.workers) for one in classes]
        found = []
        for number, start, end in best.split.stages:
            holder = holders[number]
            names = tuple(self.workers[left[numbers[member]].pop(0)].name for member in holder.members)
            shares = holder.shares(start, end, work) if isinstance(holder, Group) else ()
            found.append(Assignment(names, start, end, shares))
        return tuple(found)

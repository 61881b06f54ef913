"""Calculates the costs of stages that groups hold, as tables by the stage's start and end."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from math import inf

import numpy as np

from llamaclust.cluster.planner.costs import Counts, Flags, StageCosts, Table, WorkerFacts, sums
from llamaclust.cluster.planner.gathers import HIDDEN_SHARE, GatherTimes, GroupLinks, Seconds, gather_times
from llamaclust.cluster.planner.groups.divided_costs import DividedCosts, DividedTables, Shares
from llamaclust.cluster.planner.groups.shares import as_integers, balanced
from llamaclust.cluster.planner.links import Link
from llamaclust.cluster.planner.memory import MemoryModel
from llamaclust.cluster.planner.splits.holders import StageTable
from llamaclust.cluster.planner.work import Rows, Work
from llamaclust.model.groups.costs import GatherCost, GroupCosts
from llamaclust.model.groups.portion import Portion

_INNER, _FIRST, _LAST, _ALL = range(4)


@dataclass(frozen=True, slots=True, eq=False)
class _Kinds:
    kind_of: Counts  # Kind of each stage, by start and end.
    places: tuple[Counts, Counts]  # Start and end of one stage per kind.
    cells: Counts  # Cell number per kind. Kinds with the same cell have the same shares.

    @classmethod
    def of(cls, costs: GroupCosts) -> _Kinds:
        layers = len(costs.layers)
        starts, ends = np.indices((layers + 1, layers + 1))
        keys = 2 * (starts == 0) + (ends == layers)
        for kind in costs.kinds.values():
            count = sums(int(layer is kind) for layer in costs.layers)
            keys = np.unique(keys * (2 * layers + 1) + count + layers, return_inverse=True)[1].reshape(keys.shape)
        keys[starts >= ends] = -1
        _, firsts, kinds = np.unique(keys, return_index=True, return_inverse=True)
        places = np.unravel_index(firsts, keys.shape)
        return cls(kinds.reshape(keys.shape), (places[0], places[1]), _cells(layers)[places])


@dataclass(frozen=True, slots=True, eq=False)
class _GatherTables:
    """Numbers of gathers, and the bytes per row that they send. Tables have one value per kind of stage (`_Kinds`)."""

    count: Table
    row_bytes: Table
    outputs: Table
    output_bytes: Table
    inputs: Table  # Number of gathers for the embedding.
    input_bytes: Table

    @classmethod
    def of(cls, costs: GroupCosts, kinds: _Kinds) -> _GatherTables:
        known = {id(layer): _row_bytes(layer.gathers) for layer in costs.layers}
        is_first, is_last = kinds.places[0] == 0, kinds.places[1] == len(costs.layers)
        return cls(
            sums(len(layer.gathers) for layer in costs.layers)[kinds.places].astype(np.float64),
            sums(known[id(layer)] for layer in costs.layers)[kinds.places].astype(np.float64),
            is_last * float(len(costs.head.gathers)),
            is_last * float(_row_bytes(costs.head.gathers)),
            is_first * float(len(costs.embedding.gathers)),
            is_first * float(_row_bytes(costs.embedding.gathers)),
        )


def _row_bytes(gathers: Sequence[GatherCost]) -> int:
    return sum(sum(gather.sent_bytes((1,))) for gather in gathers)


@dataclass(frozen=True, slots=True, eq=False)
class _DividedModel:
    parts: DividedCosts
    kinds: _Kinds
    gathers: _GatherTables
    layer_gathers: Table  # Number of gathers by layer.
    layer_bytes: Table  # Bytes of one row in the gathers of each layer.


@dataclass(slots=True, eq=False)
class GroupTables:
    _sizes: MemoryModel
    costs_of: Callable[[int], GroupCosts]
    _contexts: int
    allow_unrounded: bool = False
    """True if stages need to fit only with unrounded shares."""
    _divided: dict[int, _DividedModel] = field(default_factory=dict)
    _seconds: dict[tuple[int, WorkerFacts, Rows], DividedTables] = field(default_factory=dict)
    _lacking: dict[tuple[int, WorkerFacts, bool, Portion | None], DividedTables] = field(default_factory=dict)

    def of(self, members: Sequence[WorkerFacts], links: GroupLinks) -> GroupTable:
        return GroupTable(self, tuple(members), links, self.divided(len(members)))

    def divided(self, members: int) -> _DividedModel:
        if members not in self._divided:
            costs = self.costs_of(members)
            known = next((one for one in self._divided.values() if one.parts.is_of(costs)), None)
            if known is None:
                kinds = _Kinds.of(costs)
                gathers = np.array([len(layer.gathers) for layer in costs.layers], np.float64)
                row_bytes = np.array([_row_bytes(layer.gathers) for layer in costs.layers], np.float64)
                known = _DividedModel(DividedCosts.of(costs), kinds, _GatherTables.of(costs, kinds), gathers, row_bytes)
            self._divided[members] = known
        return self._divided[members]

    def gathers_of(self, members: int) -> float:
        divided = self.divided(members)
        return float(divided.gathers.count[divided.kinds.kind_of[0, -1]])

    def least_gathers_s(self, work: Work, link: Link) -> Table:
        steps = sum(step.steps for step in work.each)
        rows = sum(step.steps * step.rows * (1 - HIDDEN_SHARE * step.is_prompt) for step in work.each)
        # In any group, a member receives at least half of each row.
        every = [
            steps * divided.layer_gathers * link.gather_s + rows * divided.layer_bytes * link.byte_s / 2
            for divided in self._divided.values()
        ]
        least: Table = np.min(every, axis=0)
        return least

    @property
    def possible(self) -> Flags:
        return self._sizes.stages.possible

    def seconds(self, divided: _DividedModel, members: Iterable[WorkerFacts], step: Rows) -> DividedTables:
        found = []
        for member in members:
            key = id(divided), member, step
            if key not in self._seconds:
                table = partial(_step_s, worker=member, step=step)
                self._seconds[key] = divided.parts.tables(table).cut(divided.kinds.places)
            found.append(self._seconds[key])
        return DividedTables.of_members(found)

    def lacking(self, divided: _DividedModel, members: Sequence[WorkerFacts]) -> DividedTables:
        """Returns how many bytes each member lacks for each kind of stage. The first member leads the group."""
        found = []
        for place, member in enumerate(members):
            portion = Portion((1,) * len(members), min(place, 1)) if self.allow_unrounded else None
            key = id(divided), member, place == 0, portion
            if key not in self._lacking:
                table = partial(self._excess, worker=member, portion=portion)
                self._lacking[key] = divided.parts.tables(table, leads=place == 0).cut(divided.kinds.places)
            found.append(self._lacking[key])
        return DividedTables.of_members(found)

    def _excess(self, costs: StageCosts, worker: WorkerFacts, portion: Portion | None) -> Table:
        return self._sizes.of(costs, portion).excess_table(worker, self._contexts)


@dataclass(eq=False)
class GroupTable:
    tables: GroupTables
    members: tuple[WorkerFacts, ...]
    links: GroupLinks
    divided: _DividedModel
    factor: float = 1.0
    """Ratio of the time with whole-number shares to the time with unrounded shares."""

    def of_work(self, work: Work) -> StageTable:
        """Returns each stage's seconds without transfers between stages, or infinity for a stage that does not fit."""
        kind_of = self.divided.kinds.kind_of
        slow = np.where(self._fits, self.factor * self._work_s(work.slowest), np.inf)
        starts, ends = np.indices(kind_of.shape)
        fits = self.tables.possible & (starts < ends)
        return StageTable(np.where(fits, slow[kind_of], np.inf), self.factor * self._work_s(work.each)[kind_of])

    def _work_s(self, steps: Iterable[Rows]) -> Table:
        total: Table = np.zeros(len(self.divided.kinds.cells))
        for step in steps:
            total += _with_gathers_s(step, self._gathers, self._computing(step).at(*self._parts).max(axis=0))
        return total

    def _computing(self, step: Rows) -> DividedTables:
        return self.tables.seconds(self.divided, self.members, Rows(step.rows, 1, step.is_prompt, concurrent=True))

    @cached_property
    def _shares(self) -> Shares:
        kinds = self.divided.kinds
        layers = len(kinds.kind_of) - 1
        numbers = kinds.kind_of[_places(layers)]
        seconds, lacking = self._token.chosen(numbers), self._lack.chosen(numbers)
        with np.errstate(invalid="ignore"):
            return balanced(self.divided.parts, seconds, lacking, allow_unrounded=self.tables.allow_unrounded)

    @cached_property
    def _token(self) -> DividedTables:
        return self.tables.seconds(self.divided, self.members, Rows(1, 1, concurrent=True))

    @cached_property
    def _lack(self) -> DividedTables:
        return self.tables.lacking(self.divided, self.members)

    @cached_property
    def _parts(self) -> tuple[list[Table], Table]:
        cells = self.divided.kinds.cells
        return [part[:, cells] for part in self.divided.parts.coarse_parts(self._shares)], self._shares[:, cells]

    @cached_property
    def _fits(self) -> Flags:
        has_all: Flags = self._parts[1].sum(axis=0) > 1 - 1e-6
        if self.tables.allow_unrounded:
            return has_all
        fits: Flags = has_all & (self._lack.at(*self._parts) <= 0).all(axis=0)
        return fits

    @cached_property
    def _gathers(self) -> GatherTimes[Table]:
        gathers, cells, links = self.divided.gathers, self.divided.kinds.cells, self.links
        layers_s = links.all_to_all_s(self._shares)[cells] * gathers.row_bytes
        return GatherTimes(
            (gathers.count + gathers.inputs) * links.gather_s,
            layers_s + links.from_leader_byte_s * gathers.input_bytes,
            gathers.outputs * links.gather_s,
            links.to_leader_s(self._shares[:, cells]) * gathers.output_bytes,
        )

    def integer_shares(self, start: int, end: int, work: Work) -> tuple[tuple[int, ...], float]:
        """Returns the fastest whole-number shares, and how many times longer they take than unrounded shares."""
        kind = np.array([self.divided.kinds.kind_of[start, end]])
        lacking, parts = self._lack.chosen(kind), self.divided.parts
        steps = [*work.slowest, *(work.each if work.adds_up else ())]
        computing = [self._computing(step).chosen(kind) for step in steps]
        costs = self.tables.costs_of(len(self.members))

        def cost(integers: tuple[int, ...]) -> float:
            fine = np.array(integers, np.float64)[:, np.newaxis] / sum(integers)
            coarse = parts.coarse_parts(fine)
            if (lacking.at(coarse, fine) > 0).any():
                return inf
            gathers = gather_times(costs, integers, start, end, self.links)
            return sum(
                _with_gathers_s(step, gathers, float(seconds.at(coarse, fine).max()))
                for step, seconds in zip(steps, computing, strict=True)
            )

        shares, taken_s = as_integers(self._shares[:, self.divided.kinds.cells[kind[0]]].tolist(), cost)
        return shares, taken_s / float(self._work_s(steps)[kind[0]])


def _with_gathers_s(step: Rows, gathers: GatherTimes[Seconds], computing_s: Seconds) -> Seconds:
    gathers_s = gathers.prefill_s(step.rows, computing_s) if step.is_prompt else gathers.decode_s(step.rows)
    return step.steps * (computing_s + gathers_s)


def _step_s(costs: StageCosts, worker: WorkerFacts, step: Rows) -> Table:
    table = costs.prefill_table if step.is_prompt else costs.decode_table
    return table(worker, step.rows, concurrent=step.concurrent)


def _cells(layers: int) -> Counts:
    starts, ends = np.indices((layers + 1, layers + 1))
    kinds = np.where(starts == 0, np.where(ends == layers, _ALL, _FIRST), np.where(ends == layers, _LAST, _INNER))
    found: Counts = kinds * (layers + 1) + np.clip(ends - starts, 0, layers)
    return found


def _places(layers: int) -> tuple[Counts, Counts]:
    counts = np.arange(layers + 1)
    some = np.clip(counts, 1, layers)
    starts = [np.where(some < layers - 1, 1, 0), np.zeros_like(some), layers - some, np.zeros_like(some)]
    ends = [np.where(some < layers - 1, some + 1, some), some, np.full_like(some, layers), np.full_like(some, layers)]
    return np.concatenate(starts), np.concatenate(ends)

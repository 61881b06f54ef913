"""Costs of stages that sets of workers hold as groups, by start and end of the stage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from llamaclust.cluster.planner.costs import Counts, Table, WorkerFacts, sums
from llamaclust.cluster.planner.groups.gathers import HIDDEN_SHARE, GroupLinks
from llamaclust.cluster.planner.groups.portions import Parts, PartTables, Shares
from llamaclust.cluster.planner.groups.shares import as_integers, balanced
from llamaclust.cluster.planner.memory import MemoryModel
from llamaclust.model.groups.costs import GatherCost, GroupCosts

_INNER, _FIRST, _LAST, _ALL = range(4)


@dataclass(frozen=True, slots=True)
class Mix:
    """The work whose time the slowest stage should have little of; without rows, only a token counts."""

    prompt_rows: int = 0
    decode_rows: int = 0
    decodes: float = 0.0


@dataclass(frozen=True, slots=True, eq=False)
class GroupTable:
    """Of one set of workers, the leader first: seconds, infinite where the stage does not fit."""

    members: tuple[WorkerFacts, ...]
    mix: Table
    token: Table
    _shares: Shares  # [members, stages as `_cells` has them]
    _seconds: tuple[PartTables, ...]
    _lacking: tuple[PartTables, ...]
    _parts: Parts

    def integer_shares(self, start: int, end: int) -> tuple[int, ...]:
        """The shares of a stage that fits."""
        layers = self._parts.whole.layers
        cell = int(_cells(layers)[start, end])
        shares, place = self._shares[:, cell], (np.array([start]), np.array([end]))
        seconds, lacking = [each.cut(place) for each in self._seconds], [each.cut(place) for each in self._lacking]

        def cost(integers: tuple[int, ...]) -> float:
            exact = np.array(integers, np.float64)[:, np.newaxis] / sum(integers)
            fine, coarse = exact, self._parts.coarse_parts(exact)
            own = [[part[member] for part in coarse] for member in range(len(integers))]
            if any((each.at(o, f) > 0).any() for each, o, f in zip(lacking, own, fine, strict=True)):
                return float("inf")
            return max(float(each.at(o, f)[0]) for each, o, f in zip(seconds, own, fine, strict=True))

        return as_integers(shares.tolist(), cost)


@dataclass(frozen=True, slots=True, eq=False)
class _GatherTables:
    """Gathers of stages: how many, and bytes of a row."""

    count: Table
    row_bytes: Table
    outputs: int
    output_bytes: float

    @classmethod
    def of(cls, costs: GroupCosts) -> _GatherTables:
        known = {id(layer): _row_bytes(layer.gathers) for layer in costs.layers}
        return cls(
            sums(len(layer.gathers) for layer in costs.layers).astype(np.float64),
            sums(known[id(layer)] for layer in costs.layers).astype(np.float64),
            len(costs.head.gathers),
            float(_row_bytes(costs.head.gathers)),
        )


def _row_bytes(gathers: Sequence[GatherCost]) -> int:
    """Of whole rows."""
    return sum(sum(gather.sent_bytes((1,))) for gather in gathers)


@dataclass(slots=True, eq=False)
class GroupTables:
    """Of all sets of workers, as they are asked for. Workers that are equal for plans share their tables."""

    _sizes: MemoryModel
    _costs_of: Callable[[int], GroupCosts]
    _contexts: int
    _mix: Mix
    _known: dict[int, tuple[Parts, _GatherTables]] = field(default_factory=dict)
    _of_worker: dict[tuple[int, WorkerFacts], tuple[PartTables, PartTables, list[PartTables]]] = field(
        default_factory=dict
    )

    def of(self, members: Sequence[WorkerFacts], links: GroupLinks) -> GroupTable | None:
        """None where gathers take longer than the slowest member for whole layers: a chain of these is as fast."""
        parts, gathers = self._costs(len(members))
        tables = [self._tables(parts, member) for member in members]
        layers = parts.whole.layers
        whole_s = max(float((token.whole + token.divided)[0, layers]) for token, _, _ in tables)
        if float(gathers.count[0, layers]) * links.gather_s >= whole_s:
            return None
        cells, places = _cells(layers), _places(layers)
        seconds, lacking = [token.cut(places) for token, _, _ in tables], [lack.cut(places) for _, lack, _ in tables]
        with np.errstate(invalid="ignore"):
            shares = balanced(parts, seconds, lacking)
        fine = [*shares[:, cells]]
        coarse = [part[:, cells] for part in parts.coarse_parts(shares)]
        own = [[part[member] for part in coarse] for member in range(len(members))]
        starts, ends = np.indices(cells.shape)
        fits = (shares.sum(axis=0) > 1 - 1e-6)[cells] & self._sizes.stages.possible & (starts < ends)
        for (_, lack, _), o, f in zip(tables, own, fine, strict=True):
            fits &= lack.at(o, f) <= 0
        at = partial(_slowest, own, fine)
        is_last = np.arange(layers + 1) == layers
        busiest_s = links.all_to_all_s(shares)[cells] * gathers.row_bytes
        output_s = is_last * (
            gathers.outputs * links.gather_s + links.to_leader_s(shares)[cells] * gathers.output_bytes
        )
        fixed_s = gathers.count * links.gather_s
        token_s = at([token for token, _, _ in tables]) + fixed_s + busiest_s + output_s
        mix_s = np.zeros_like(token_s)
        if self._mix.prompt_rows:
            prefill_s, decode_s = (at([of_mix[number] for _, _, of_mix in tables]) for number in (0, 1))
            sent_s = self._mix.prompt_rows * busiest_s
            mix_s += prefill_s + fixed_s + sent_s - np.minimum(HIDDEN_SHARE * sent_s, prefill_s)
            mix_s += self._mix.decodes * (decode_s + fixed_s + output_s + self._mix.decode_rows * busiest_s)
        return GroupTable(
            tuple(members),
            np.where(fits, mix_s, np.inf),
            np.where(fits, token_s, np.inf),
            shares,
            tuple(token for token, _, _ in tables),
            tuple(lack for _, lack, _ in tables),
            parts,
        )

    def _costs(self, members: int) -> tuple[Parts, _GatherTables]:
        if members not in self._known:
            costs = self._costs_of(members)
            alike = next((one for one in self._known.values() if one[0].is_of(costs)), None)
            self._known[members] = alike or (Parts.of(costs), _GatherTables.of(costs))
        return self._known[members]

    def _tables(self, parts: Parts, worker: WorkerFacts) -> tuple[PartTables, PartTables, list[PartTables]]:
        """(seconds of a token, bytes lacking, seconds of a prompt and of a step of the mix)."""
        key = id(parts), worker
        if key not in self._of_worker:
            self._of_worker[key] = (
                parts.tables(lambda costs: costs.decode_table(worker, concurrent=True)),
                parts.tables(lambda costs: self._sizes.of(costs).excess_table(worker, self._contexts)),
                list(self._mix_tables(parts, worker)),
            )
        return self._of_worker[key]

    def _mix_tables(self, parts: Parts, worker: WorkerFacts) -> Sequence[PartTables]:
        mix = self._mix
        if not mix.prompt_rows:
            return ()
        return (
            parts.tables(lambda costs: costs.prefill_table(worker, mix.prompt_rows, concurrent=True)),
            parts.tables(lambda costs: costs.decode_table(worker, mix.decode_rows, concurrent=True)),
        )


def _slowest(own: Sequence[Sequence[Table]], fine: Sequence[Table], tables: Sequence[PartTables]) -> Table:
    found: Table = np.max([table.at(o, f) for table, o, f in zip(tables, own, fine, strict=True)], axis=0)
    return found


def _cells(layers: int) -> Counts:
    """By start and end, the number of a stage of as many layers, which begins and ends with the model as this one does:
    shares are made for these, since layers are much alike."""
    starts, ends = np.indices((layers + 1, layers + 1))
    kinds = np.where(starts == 0, np.where(ends == layers, _ALL, _FIRST), np.where(ends == layers, _LAST, _INNER))
    found: Counts = kinds * (layers + 1) + np.clip(ends - starts, 0, layers)
    return found


def _places(layers: int) -> tuple[Counts, Counts]:
    """Start and end of each of these stages; where there is none, of some other."""
    counts = np.arange(layers + 1)
    some = np.clip(counts, 1, layers)
    starts = [np.where(some < layers - 1, 1, 0), np.zeros_like(some), layers - some, np.zeros_like(some)]
    ends = [np.where(some < layers - 1, some + 1, some), some, np.full_like(some, layers), np.full_like(some, layers)]
    return np.concatenate(starts), np.concatenate(ends)

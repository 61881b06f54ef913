"""Calculates the costs of a worker in a group. Some costs are divided among members, and others are not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np

from llamaclust.cluster.planner.costs import Counts, StageCosts, Table
from llamaclust.model.costs import ModelCosts
from llamaclust.model.groups.costs import DividedLayer, GroupCosts, PortionCost

_FINE = 64
"""A part of a layer with at least this number of units, such as attention heads, counts as divisible in any ratio."""

Shares = Table
"""Shares of members, [members, ...]. Their sum over members is 1."""


@dataclass(frozen=True, slots=True)
class DividedCosts:
    """Costs of a model whose layers are divided among group members."""

    whole: StageCosts  # The leader's undivided costs.
    follower: StageCosts  # The undivided costs of any other member.
    # Entries (units, costs of `whole` plus the parts of layers with this number of units).
    coarse: tuple[tuple[int, StageCosts], ...]
    fine: StageCosts  # Costs of `whole` plus the parts that are divisible in any ratio.
    least_units: int  # Minimum number of units among the parts in `fine`.
    divided: tuple[DividedLayer, ...]

    @classmethod
    def of(cls, costs: GroupCosts) -> Self:
        kinds = {portion.units for layer in (*costs.layers, costs.head) for portion in layer.portions}
        coarse, fine = sorted(units for units in kinds if units < _FINE), {units for units in kinds if units >= _FINE}
        kept = ((units, _costs(costs, {units})) for units in coarse)
        whole, least_units = _costs(costs, set()), min(fine, default=_FINE)
        follower = _stage_costs(costs, costs.of_follower(whole.model))
        return cls(whole, follower, tuple(kept), _costs(costs, fine), least_units, _divided(costs))

    def is_of(self, costs: GroupCosts) -> bool:
        return self.divided == _divided(costs)

    def tables(self, table: Callable[[StageCosts], Table], *, leads: bool = True) -> DividedTables:
        whole = table(self.whole)
        return DividedTables(
            whole if leads else table(self.follower),
            tuple(_more(table(costs), whole) for _, costs in self.coarse),
            _more(table(self.fine), whole),
        )

    def coarse_parts(self, shares: Shares) -> list[Shares]:
        return [_in_units(units, shares) for units, _ in self.coarse]


@dataclass(frozen=True, slots=True, eq=False)
class DividedTables:
    """Stage costs in three parts: `whole` is not divided, `coarse` is divided in whole units, and `fine` is divided in
    any ratio. For several members, each table has the shape [members, ...]."""

    whole: Table
    coarse: tuple[Table, ...]
    fine: Table

    @classmethod
    def of_members(cls, tables: Sequence[DividedTables]) -> DividedTables:
        coarse = zip(*(table.coarse for table in tables), strict=True)
        return cls(
            np.array([table.whole for table in tables]),
            tuple(np.array(parts) for parts in coarse),
            np.array([table.fine for table in tables]),
        )

    def at(self, coarse: Sequence[Table], fine: Table) -> Table:
        found = self.whole + fine * self.fine
        for part, table in zip(coarse, self.coarse, strict=True):
            found = found + part * table
        return found

    def cut(self, cells: tuple[Counts, Counts]) -> DividedTables:
        return DividedTables(self.whole[cells], tuple(table[cells] for table in self.coarse), self.fine[cells])

    def chosen(self, numbers: Counts) -> DividedTables:
        coarse = tuple(table[..., numbers] for table in self.coarse)
        return DividedTables(self.whole[..., numbers], coarse, self.fine[..., numbers])

    def with_coarse(self, coarse: Sequence[Table]) -> DividedTables:
        return DividedTables(self.at(coarse, np.zeros(())), (), self.fine)

    @property
    def divided(self) -> Table:
        return np.asarray(sum(self.coarse, self.fine))


def _divided(costs: GroupCosts) -> tuple[DividedLayer, ...]:
    return (*costs.kinds.values(), costs.head)


def _costs(costs: GroupCosts, kinds: set[int]) -> StageCosts:
    alike = {kind: _kept(layer, kinds) for kind, layer in costs.kinds.items()}
    kept = replace(
        costs, members=1, layers=tuple(alike[id(layer)] for layer in costs.layers), head=_kept(costs.head, kinds)
    )
    return _stage_costs(costs, kept.member((1,), 0))


def _stage_costs(costs: GroupCosts, own: ModelCosts) -> StageCosts:
    return StageCosts.of(own, own.head_bytes / max(costs.model.head_bytes, 1))


def _kept(layer: DividedLayer, kinds: set[int]) -> DividedLayer:
    return replace(layer, portions=tuple(_portions(layer, kinds)))


def _portions(layer: DividedLayer, kinds: set[int]) -> Iterator[PortionCost]:
    for portion in layer.portions:
        yield portion if portion.units in kinds else PortionCost(portion.units, portion.of(0))


def _more(table: Table, whole: Table) -> Table:
    both = np.isfinite(table) & np.isfinite(whole)
    return np.subtract(table, whole, out=np.zeros_like(whole), where=both)


def _in_units(units: int, shares: Shares) -> Shares:
    members = len(shares)
    places = np.rint(units * np.cumsum(shares, axis=0))
    before: Table = np.zeros(shares.shape[1:])
    found = np.empty_like(shares)
    for member in range(members):
        place = np.clip(places[member], before + 1, units - (members - 1 - member)) if member < members - 1 else units
        found[member] = (place - before) / units
        before = np.asarray(place, np.float64)
    return found

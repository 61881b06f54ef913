"""Who gets which layers: the best cut over all sets and orders of workers, by dynamic programming.

Exact for a few workers, or many of a few kinds; else over orders that are likely, with a bound on what any cut could
reach. A cut is judged by its slowest stage and by the sum over its stages; a worker may stay without layers.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from heapq import heappop, heappush
from math import inf, prod
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from llamaclust.cluster.costs import Table, WorkerFacts

_MOST_STEPS = 8 * (1 << 8) // 2
"""All orders are tried where that takes no more steps than with eight workers that are all different."""

_CLOSE = 0.99
"""A cut that is not better by more than this is not looked for."""

_CLEARLY_BETTER = 0.95
"""So much better a cut must be for another order than the file's."""

Stage = tuple[int, int, int]
"""(worker, start, end): layers [start, end) on a worker, by its place in the file."""


@dataclass(frozen=True, slots=True, eq=False)
class Kind:
    """Workers that are alike, and what a stage of layers [start, end) costs on one of them."""

    workers: tuple[int, ...]
    slow: Table  # of which the slowest stage should have little; infinite where a stage cannot be
    total: Table  # of which all stages together should have little

    @property
    def layers(self) -> int:
        return len(self.slow) - 1

    def within(self, limit: float) -> NDArray[np.bool_]:
        """Which stages can be, and are within the limit."""
        return (self.slow <= limit) & (self.slow < inf)

    def allowed(self, limit: float) -> Table:
        """Totals of those stages."""
        return np.where(self.within(limit), self.total, inf)


def kinds_of(workers: Sequence[WorkerFacts], tables: Callable[[WorkerFacts], tuple[Table, Table]]) -> list[Kind]:
    """Workers by kind; `tables` says what is slow and what the total is of, for one of each."""
    alike: dict[WorkerFacts, list[int]] = {}
    for index, worker in enumerate(workers):
        alike.setdefault(replace(worker, name=""), []).append(index)
    return [Kind(tuple(indices), *tables(facts)) for facts, indices in alike.items()]


Order = Sequence[tuple[int, Kind]]
"""Workers one behind the other, each with its kind."""


@dataclass(frozen=True, slots=True)
class Cut:
    """Stages in order, from the first layer to the last."""

    stages: tuple[Stage, ...]
    slowest: float
    total: float


@dataclass(frozen=True, slots=True)
class Aim:
    """The least slowest * total ** `total_weight` with a total of `most_total` at most; equal ones by their total."""

    total_weight: int = 0
    most_total: float = inf

    def score(self, slowest: float, total: float) -> float:
        return float(slowest * total**self.total_weight)


class Way(Protocol):
    """Some set of cuts."""

    def least(self, limit: float) -> Cut | None:
        """The one with the least total of those whose slowest stage is within the limit; None where there is none."""
        ...


class GivenOrder:
    """Every cut of workers in one order."""

    def __init__(self, order: Order) -> None:
        self._order = order

    def least(self, limit: float) -> Cut | None:
        layers = self._order[0][1].layers
        allowed = {id(kind): kind.allowed(limit) for _, kind in self._order}
        tables = [allowed[id(kind)] for _, kind in self._order]
        best = [_nothing(layers)]  # [workers asked][layers covered]
        for table in tables:
            best.append(np.minimum(best[-1], _one_more(best[-1], table)))
        if best[-1][layers] == inf:
            return None
        stages: list[tuple[int, Kind, int, int]] = []
        end = layers
        for index in reversed(range(len(tables))):
            if best[index + 1][end] < best[index][end]:
                start = int((best[index] + tables[index][:, end]).argmin())
                stages.append((*self._order[index], start, end))
                end = start
        return _cut(stages)


class AnyOrder:
    """Every cut of any workers in any order. Of workers that are alike only the number counts."""

    def __init__(self, kinds: Sequence[Kind]) -> None:
        self._kinds = kinds
        self._sizes = tuple(len(kind.workers) + 1 for kind in kinds)

    @property
    def steps(self) -> int:
        """How often one more worker is added."""
        return sum(prod(self._sizes) // size * (size - 1) for size in self._sizes)

    def least(self, limit: float) -> Cut | None:
        layers = self._kinds[0].layers
        tables = [kind.allowed(limit) for kind in self._kinds]
        best: dict[tuple[int, ...], Table] = {}  # [workers used of each kind][layers covered]
        for used in np.ndindex(*self._sizes):
            reached = [_one_more(best[before], tables[kind]) for kind, before in _one_less(used)]
            best[used] = np.minimum.reduce(reached) if reached else _nothing(layers)
        used = min(best, key=lambda used: float(best[used][layers]))
        return None if best[used][layers] == inf else self._walk(best, used, tables)

    def _walk(self, best: dict[tuple[int, ...], Table], used: tuple[int, ...], tables: Sequence[Table]) -> Cut:
        """The cut behind best[used][layers]."""
        stages: list[tuple[int, Kind, int, int]] = []
        end = self._kinds[0].layers
        while any(used):
            ways = [(best[before] + tables[kind][:, end], kind, before) for kind, before in _one_less(used)]
            costs, number, before = min(ways, key=lambda way: float(way[0].min()))
            kind, start = self._kinds[number], int(costs.argmin())
            stages.append((kind.workers[used[number] - 1], kind, start, end))
            used, end = before, start
        return _cut(stages)


def _nothing(layers: int) -> Table:
    """The cost of layers [0, end) without a worker."""
    return np.where(np.arange(layers + 1) == 0, 0.0, inf)


def _one_more(best: Table, table: Table) -> Table:
    """The least cost of layers [0, end), the last of them on one more worker."""
    least: Table = (best[:, np.newaxis] + table).min(axis=0)
    return least


def _one_less(used: tuple[int, ...]) -> Iterator[tuple[int, tuple[int, ...]]]:
    """(kind, numbers without one worker of it)."""
    for kind, count in enumerate(used):
        if count:
            yield kind, (*used[:kind], count - 1, *used[kind + 1 :])


def _cut(backwards: Sequence[tuple[int, Kind, int, int]]) -> Cut:
    """Of stages from the last to the first."""
    stages = tuple((worker, start, end) for worker, _, start, end in reversed(backwards))
    slowest = max(float(kind.slow[start, end]) for _, kind, start, end in backwards)
    return Cut(stages, slowest, sum(float(kind.total[start, end]) for _, kind, start, end in backwards))


def _best_of(way: Way, limits: Table, aim: Aim, known: Cut | None = None) -> Cut | None:
    """The cut that comes closest to the aim; `known` where none is clearly better.

    Intervals of limits are halved, the most promising one first: the total at an interval's upper end is the least one
    in all of it.
    """
    best = known
    best_score = inf if known is None else aim.score(known.slowest, known.total) * _CLEARLY_BETTER / _CLOSE
    open_: list[tuple[float, int, int]] = [(0.0, 0, len(limits))]  # (score at best, limits [low, high))
    while open_ and open_[0][0] < best_score * _CLOSE:
        _, low, high = heappop(open_)
        cut = way.least(float(limits[high - 1]))
        if cut is None or cut.total > aim.most_total:
            continue
        score = aim.score(cut.slowest, cut.total)
        if score < best_score:
            best, best_score = cut, score
        high = min(high - 1, int(np.searchsorted(limits, cut.slowest)))
        for start, end in ((low, (low + high) // 2), ((low + high) // 2, high)):
            if start < end:
                heappush(open_, (aim.score(float(limits[start]), cut.total), start, end))
    return best


@dataclass(frozen=True, slots=True)
class Best:
    """The best cut that was found."""

    cut: Cut
    excess: float | None  # how far what it aims at is above what no cut can reach, at most; None: no cut is better


def best_cut(kinds: Sequence[Kind], total_weight: int = 0, total_slack: float = inf) -> Best | None:
    """The least slowest * total ** total_weight, with a total of at most total_slack times the least one.

    Workers keep the file's order unless another one is clearly better. None where no cut can be.
    """
    limits = _limits(kinds)
    ways = _ways(kinds, limits)
    totals = [cut.total for way in ways if (cut := way.least(inf)) is not None]
    if not totals:
        return None
    aim = Aim(total_weight, min(totals) * total_slack)
    best = None
    for way in ways:
        best = _best_of(way, limits, aim, best)
    assert best is not None
    if _is_exact(kinds):
        return Best(best, None)
    slowest, total = _least_possible(kinds, limits)
    return Best(best, best.total / total - 1 if total_weight else best.slowest / slowest - 1)


def least_total(kinds: Sequence[Kind]) -> float:
    """Of all cuts whose stages can be; infinite where there is none."""
    cuts = [way.least(inf) for way in _ways(kinds, _limits(kinds))]
    return min((cut.total for cut in cuts if cut is not None), default=inf)


def _limits(kinds: Sequence[Kind]) -> Table:
    """All costs that a slowest stage can have, ascending."""
    return np.unique(np.concatenate([kind.slow[np.isfinite(kind.slow)] for kind in kinds]))


def _is_exact(kinds: Sequence[Kind]) -> bool:
    return len(kinds) == 1 or AnyOrder(kinds).steps <= _MOST_STEPS


def _ways(kinds: Sequence[Kind], limits: Table) -> list[Way]:
    """The file's order, and what may be better."""
    order = sorted((worker, kind) for kind in kinds for worker in kind.workers)
    file: list[Way] = [GivenOrder(order)]
    if len(kinds) == 1 or not len(limits):
        return file
    return [*file, AnyOrder(kinds)] if _is_exact(kinds) else [*file, *map(GivenOrder, _likely_orders(order, limits))]


# -- more workers of more kinds than can be tried in all orders --------------------------------------------------------


def _likely_orders(order: Order, limits: Table) -> list[Order]:
    """Orders with the best first and last worker, which besides layers have the embedding and the head: of all workers,
    and of the fastest ones. In between the order hardly matters: layers are much alike."""
    by_total = sorted(order, key=lambda one: float(one[1].total[0, one[1].layers]))
    counts = range(1, len(order) + 1)
    fewest = bisect_left(counts, True, key=lambda count: _best_ends(by_total[:count], inf) is not None)
    if fewest == len(order):
        return []
    found = []
    for count in sorted({fewest + 1, (fewest + 1 + len(order)) // 2, len(order)}):
        some = sorted(by_total[:count], key=lambda one: one[0])
        limit = limits[bisect_left(limits, True, key=lambda limit: _best_ends(some, limit) is not None)]
        ends = _best_ends(some, limit)
        assert ends is not None
        found.append(ends)
    return found


def _best_ends(order: Order, limit: float) -> Order | None:
    """The order with another first and last worker that covers all layers within the limit; None where none does."""
    layers, numbers = order[0][1].layers, np.arange(len(order))
    reach = np.array([_reach(kind, limit) for _, kind in order])  # [workers, layers]: where a stage ends at most
    first, last = numbers[:, np.newaxis], numbers[np.newaxis, :]
    covered = np.repeat(reach[:, :1], len(order), axis=1)  # [first worker, last worker]
    for number in numbers:
        covered = np.where((first == number) | (last == number), covered, reach[number][covered])
    covered = np.where(first == last, covered, reach[last, covered])
    if covered.max() < layers:
        return None
    begin, end = map(int, np.unravel_index(int(covered.argmax()), covered.shape))
    inner = [one for number, one in enumerate(order) if number not in (begin, end)]
    return [order[begin], *inner, *([order[end]] if begin != end else [])]


def _reach(kind: Kind, limit: float) -> Table:
    """Where a stage from each layer ends at most, within the limit."""
    ends = np.arange(kind.layers + 1)
    furthest: Table = np.where(kind.within(limit), ends, ends[:, np.newaxis]).max(axis=1)
    return furthest


def _least_possible(kinds: Sequence[Kind], limits: Table) -> tuple[float, float]:
    """(slowest, total) that no cut is below: every worker as good as at its best place, wherever that is."""
    layers = kinds[0].layers
    index = bisect_left(limits, layers, key=lambda limit: _most_layers(kinds, limit))
    rates, rooms = np.array([_cheapest(kind) for kind in kinds]).T
    by_rate = np.argsort(rates)
    upto = np.concatenate([[0.0], np.cumsum(rooms[by_rate])])
    costs = np.concatenate([[0.0], np.cumsum((rooms * rates)[by_rate])])
    before = np.interp(np.arange(layers + 1), upto, costs, right=inf)  # of the layers before the last stage
    return float(limits[index]), min(float((before + kind.allowed(inf)[:, -1]).min()) for kind in kinds)


def _most_layers(kinds: Sequence[Kind], limit: float) -> int:
    """How many layers all workers together can hold within the limit, one of them the last ones."""
    inner, last = np.array([_longest(kind, limit) for kind in kinds]).T
    everyone = sum(len(kind.workers) * int(count) for kind, count in zip(kinds, inner, strict=True))
    return everyone + int((last - inner)[last > 0].max(initial=-everyone))


def _longest(kind: Kind, limit: float) -> tuple[int, int]:
    """Most layers of (a stage without the last one, a stage with it) within the limit."""
    ends = np.arange(kind.layers + 1)
    sizes = np.where(kind.within(limit), ends - ends[:, np.newaxis], 0)
    return int(sizes[:, :-1].max()), int(sizes[:, -1].max())


def _cheapest(kind: Kind) -> tuple[float, int]:
    """(least cost of a layer, most layers) on all workers of the kind."""
    ends = np.arange(kind.layers + 1)
    inner = kind.allowed(inf)[:, :-1] / np.maximum(ends[:-1] - ends[:, np.newaxis], 1)
    room = len(kind.workers) * _longest(kind, inf)[0]
    return (float(inner.min()), room) if room else (0.0, 0)

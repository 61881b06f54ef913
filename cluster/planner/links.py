"""Latencies and transfer times of links between workers, and of their links to the coordinator."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations, pairwise

import numpy as np
from numpy.typing import NDArray

Pair = frozenset[str]
Pairs = frozenset[Pair]

COORDINATOR = ""

_NOISE_S = 5e-5
_NOISE_BYTE_S = 5e-11
_NOISE = 0.1
"""Maximum relative difference of link times at which workers count as equally far away."""


@dataclass(frozen=True, slots=True)
class Link:
    one_way_s: float  # Seconds of an empty message.
    byte_s: float
    network_s: float | None = None  # The network's part of `one_way_s`. None: unknown.

    @property
    def gather_s(self) -> float:
        """Time of an empty message in a gather. Only the network's time counts, because members poll their sockets."""
        return max(0.0, self.one_way_s - _PROGRAMS_S) if self.network_s is None else self.network_s


_PROGRAMS_S = 1.5e-4
USUAL = Link(one_way_s=_PROGRAMS_S, byte_s=1e-9)
"""Assumed link if none was measured. It resembles a link between two processes on one machine."""


NO_REACH = Link(one_way_s=0.0, byte_s=0.0)
"""A worker's part of link times (see `Links.reaches`) if no link was measured."""


@dataclass(frozen=True, slots=True)
class Links:
    """Links between pairs of workers. An unknown link counts as `USUAL`."""

    measured: Mapping[frozenset[str], Link] = field(default_factory=dict)

    def between(self, one: str, other: str) -> Link:
        return self.measured.get(frozenset((one, other)), USUAL)

    def are_known(self, names: Collection[str]) -> bool:
        return all(frozenset(pair) in self.measured for pair in combinations(names, 2))

    def round(self, stages: Sequence[str]) -> list[Link]:
        pairs = pairwise([*stages, stages[0]]) if len(stages) > 1 else ()
        return [self.between(*pair) for pair in pairs]

    def estimated(self, pairs: Iterable[frozenset[str]]) -> Links:
        """Returns these links, with estimates added for the `pairs` that were not measured."""
        reaches = self.reaches({name for pair in self.measured for name in pair})
        known = (sorted(pair) for pair in pairs if pair <= reaches.keys())
        sums = {
            frozenset((one, other)): Link(
                reaches[one].one_way_s + reaches[other].one_way_s, reaches[one].byte_s + reaches[other].byte_s
            )
            for one, other in known
        }
        return Links(sums | {**self.measured})

    def reaches(self, names: Collection[str]) -> dict[str, Link]:
        """Estimates each worker's part of link times. The sum of two workers' parts is near their link's time."""
        pairs = [pair for pair in combinations(sorted(names), 2) if frozenset(pair) in self.measured]
        if not pairs:
            return dict.fromkeys(names, NO_REACH)
        order = {name: index for index, name in enumerate(sorted(names))}
        ends = np.zeros((len(pairs), len(order)))
        for row, pair in enumerate(pairs):
            ends[row, [order[name] for name in pair]] = 1.0
        links = [self.measured[frozenset(pair)] for pair in pairs]
        values = np.array([(link.one_way_s, link.byte_s) for link in links])
        solved = np.linalg.lstsq(ends.T @ ends, ends.T @ values, rcond=None)[0]
        solved = np.maximum(solved, 0.0)
        one_way, byte = _alike(solved[:, 0], _NOISE_S), _alike(solved[:, 1], _NOISE_BYTE_S)
        return {name: Link(one_way[index], byte[index]) for name, index in order.items()}


def _alike(values: NDArray[np.float64], noise: float) -> list[float]:
    order = np.argsort(values, kind="stable")
    ascending = values[order]
    apart = np.diff(ascending) > np.maximum(noise, _NOISE * ascending[1:])
    alike = np.empty_like(values)
    for group in np.split(order, np.flatnonzero(apart) + 1):
        alike[group] = values[group].mean()
    return [float(value) for value in alike]


UNKNOWN = Links()


def violated_pair(stages: Sequence[Sequence[str]], partitions: Pairs) -> Pair | None:
    """Returns two workers that must exchange data but cannot reach each other, or None."""
    leaders = [workers[0] for workers in stages]
    neighbours = [*zip(leaders, (leaders[-1:] + leaders), strict=False)]
    neighbours += [pair for workers in stages for pair in combinations(workers, 2)]
    return next((pair for pair in map(frozenset, neighbours) if pair in partitions), None)


def disputed_pair(stages: Sequence[Sequence[str]], disputes: Pairs) -> Pair | None:
    """Returns two workers of one group that accuse each other, or None."""
    return next((pair for pair in sorted(disputes, key=sorted) if any(pair <= {*workers} for workers in stages)), None)

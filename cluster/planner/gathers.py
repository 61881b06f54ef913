"""Predicts the time of gathers. In a gather, the members of a group exchange their parts of rows, so that every member
has whole rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Generic, Self, TypeVar

import numpy as np

from llamaclust.cluster.planner.costs import Table
from llamaclust.cluster.planner.links import Links
from llamaclust.model.groups.costs import GatherCost, GroupCosts

GATHER_S = 35e-6
"""Seconds of a gather in addition to the network time, measured on loopback (docs/internals/groups.md)."""
HIDDEN_SHARE = 0.5
"""Maximum fraction of a prompt's bytes that can be sent while members compute other rows."""

Seconds = TypeVar("Seconds", float, Table)


@dataclass(frozen=True, slots=True, eq=False)
class GroupLinks:
    gather_s: float  # Seconds of an empty gather.
    byte_s: Table  # Seconds per byte, [sender, receiver]. 0 on the diagonal.

    @classmethod
    def of(cls, links: Links, members: Sequence[str]) -> Self:
        byte_s = np.array(
            [[0.0 if one == other else links.between(one, other).byte_s for other in members] for one in members]
        )
        latency_s = max(links.between(*pair).gather_s for pair in combinations(members, 2))
        return cls(latency_s + GATHER_S, byte_s)

    def all_to_all_s(self, sent: Table) -> Table:
        """Returns the seconds until each member has sent its bytes to all others. `sent` has shape [members, ...]."""
        out = sent * self.byte_s.sum(axis=1).reshape(-1, *[1] * (sent.ndim - 1))
        into = np.tensordot(self.byte_s.T, sent, axes=1)
        slowest: Table = np.maximum(out, into).max(axis=0)
        return slowest

    @property
    def from_leader_byte_s(self) -> float:
        return float(self.byte_s[0].sum())

    def to_leader_s(self, sent: Table) -> Table:
        """Returns the seconds until the leader has the bytes of all followers. `sent` has shape [members, ...]."""
        found: Table = np.tensordot(self.byte_s[:, 0], sent, axes=1)
        return found


@dataclass(frozen=True, slots=True)
class GatherTimes(Generic[Seconds]):
    layers_s: Seconds
    row_s: Seconds
    output_s: Seconds
    output_row_s: Seconds

    def decode_s(self, rows: int) -> Seconds:
        return self.layers_s + self.output_s + rows * (self.row_s + self.output_row_s)

    def prefill_s(self, rows: int, computing_s: Seconds) -> Seconds:
        """Returns the seconds that gathers add to the `computing_s` seconds of a prefill of `rows` tokens."""
        bytes_s = rows * self.row_s
        found: Seconds = self.layers_s + bytes_s - np.minimum(HIDDEN_SHARE * bytes_s, computing_s)
        return found


NO_GATHERS = GatherTimes(0.0, 0.0, 0.0, 0.0)


def gather_times(
    costs: GroupCosts, shares: Sequence[int], start: int, end: int, links: GroupLinks
) -> GatherTimes[float]:
    gathers = [] if start else [*costs.embedding.gathers]
    gathers += (gather for layer in costs.layers[start:end] for gather in layer.gathers)
    outputs = costs.head.gathers if end == len(costs.layers) else ()
    return GatherTimes(*_seconds(gathers, shares, links), *_seconds(outputs, shares, links))


def _seconds(gathers: Iterable[GatherCost], shares: Sequence[int], links: GroupLinks) -> tuple[float, float]:
    """Returns (fixed seconds of all gathers, additional seconds per row)."""
    fixed_s = row_s = 0.0
    known: dict[int, float] = {}  # By identity, as layers of a kind have the same gathers and hashing is slow.
    for gather in gathers:
        if id(gather) not in known:
            sent = np.array(gather.sent_bytes(shares), np.float64)
            known[id(gather)] = float((links.to_leader_s if gather.to_leader else links.all_to_all_s)(sent))
        fixed_s += links.gather_s
        row_s += known[id(gather)]
    return fixed_s, row_s

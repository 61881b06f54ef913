"""The table of cached experts. It chooses the next expert to copy by recent uses. It does not access the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llamaclust.kernels.backend import Int32

_HALF_LIFE_STEPS = 256
_LEAD_USES = 1.0
"""An expert takes another expert's slot only if it has this many more uses."""
_GREATEST_WEIGHT = 1e100
_FREE = -1


@dataclass(frozen=True, slots=True)
class Pool:
    mixtures: tuple[int, ...]  # Numbers of the mixtures that share the pool.
    slots: int


@dataclass(frozen=True, slots=True)
class Copy:
    mixture: int
    expert: int
    pool: int
    slot: int


class ExpertTable:
    """The use counts and slots of experts. A step counts each expert at most once. Recent steps have more weight."""

    def __init__(self, pools: Sequence[Pool], experts: int) -> None:
        self._pools = tuple(pools)
        mixtures = 1 + max(number for pool in pools for number in pool.mixtures)
        self._pool_of = {number: index for index, pool in enumerate(pools) for number in pool.mixtures}
        self._places: Int32 = np.full((mixtures, experts), _FREE, np.int32)
        self._uses: NDArray[np.float64] = np.zeros((mixtures, experts))
        self._owners: list[NDArray[np.int64]] = [np.full((pool.slots, 2), _FREE, np.int64) for pool in pools]
        self._in_use = [np.zeros(pool.slots, np.bool_) for pool in pools]  # True for slots that the current step uses.
        self._weight = 1.0
        self._copying: Copy | None = None
        self.hits = self.misses = 0

    def use(self, mixture: int, experts: Int32) -> Int32:
        """Counts a use of each expert. Returns the experts' slots (-1 if not cached), valid until `end_step`."""
        used = np.unique(experts)
        self._uses[mixture, used] += self._weight
        places = self._places[mixture, used]
        there = places[places != _FREE]
        self._in_use[self._pool_of[mixture]][there] = True
        self.hits += len(there)
        self.misses += len(used) - len(there)
        found: Int32 = self._places[mixture, experts]
        return found

    def end_step(self) -> None:
        for flags in self._in_use:
            flags[:] = False
        self._weight *= 2 ** (1 / _HALF_LIFE_STEPS)
        if self._weight > _GREATEST_WEIGHT:
            self._uses /= self._weight
            self._weight = 1.0

    def next_copy(self) -> Copy | None:
        """Chooses the most used expert that is not cached, and a slot for it, or returns None if no slot is available.
        The caller must call `complete` before the next call."""
        assert self._copying is None, "one at a time"
        found = [(copy, uses) for index in range(len(self._pools)) for copy, uses in self._copies(index)]
        if not found:
            return None
        copy, _ = max(found, key=lambda pair: pair[1])
        mixture, expert = self._owners[copy.pool][copy.slot]
        if mixture != _FREE:
            self._places[mixture, expert] = _FREE
            self._owners[copy.pool][copy.slot] = _FREE
        self._copying = copy
        return copy

    def complete(self) -> None:
        copy = self._copying
        assert copy is not None
        self._places[copy.mixture, copy.expert] = copy.slot
        self._owners[copy.pool][copy.slot] = copy.mixture, copy.expert
        self._copying = None

    @property
    def held(self) -> Sequence[int]:
        return [int((owners[:, 0] != _FREE).sum()) for owners in self._owners]

    def _copies(self, index: int) -> Sequence[tuple[Copy, float]]:
        pool = self._pools[index]
        if not pool.slots:
            return ()
        rows = np.array(pool.mixtures)
        uses = np.where(self._places[rows] == _FREE, self._uses[rows], 0.0)
        at, expert = np.unravel_index(int(uses.argmax()), uses.shape)
        best = float(uses[at, expert])
        slot, least = self._least_used(index)
        if best <= 0.0 or best < least:
            return ()
        return ((Copy(int(rows[at]), int(expert), index, slot), best),)

    def _least_used(self, index: int) -> tuple[int, float]:
        owners = self._owners[index]
        mixture, expert = owners.T
        needed = np.where(mixture == _FREE, 0.0, self._uses[mixture, expert] + _LEAD_USES * self._weight)
        needed[self._in_use[index]] = np.inf
        slot = int(needed.argmin())
        return slot, float(needed[slot])

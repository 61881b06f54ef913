"""Tracks pairs of connected workers that cannot reach each other. Probes each pair until its link works again."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import permutations
from typing import Self

from llamaclust.cluster.control.pool.closed_ports import ClosedPorts
from llamaclust.cluster.membership.worker_handle import WorkerHandle
from llamaclust.cluster.membership.worker_requests import probe
from llamaclust.cluster.planner.links import Pair, Pairs
from llamaclust.cluster.state.events import Notice, Report
from llamaclust.core.backoff import Backoff
from llamaclust.core.errors import DeadlineError, WorkerError
from llamaclust.wire.control.messages import PeerUnreachable
from llamaclust.wire.rpc.task_set import TaskSet

_BACKOFF = Backoff(first_s=1.0, max_s=120.0, factor=1.5)
_MEMORY_S = 600.0
"""Seconds for which a repaired link is remembered. If it breaks again in this time, it is probed less often."""
_MAX_PROBES = 256
"""Maximum number of links to probe at once. If there are more, only links of workers with a broken link are probed."""

_Direction = tuple[WorkerHandle, WorkerHandle]


@dataclass(slots=True)
class _Partition:
    probes: int  # Number of failed probes, including probes before the last repair.
    # Maps a worker's name to the name of the worker that it could not reach.
    callers: dict[str, str] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class PartitionTracker:
    """Probes broken links while this context manager is open."""

    _workers: Callable[[], Mapping[str, WorkerHandle]]  # Returns the connected workers by name.
    _heartbeat_timeout_s: float
    _report: Report
    _on_change: Callable[[Pairs], None]  # Is called with all broken pairs after each change.
    _ports: ClosedPorts
    _partitions: dict[Pair, _Partition] = field(default_factory=dict, init=False)
    # Time of the last repair, and number of failed probes before the repair.
    _healed: dict[Pair, tuple[float, int]] = field(default_factory=dict, init=False)
    _pending: dict[_Direction, asyncio.Task[None]] = field(default_factory=dict, init=False)
    _probing: dict[Pair, asyncio.Task[None]] = field(default_factory=dict, init=False)
    _tasks: TaskSet = field(default_factory=TaskSet, init=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._tasks.cancel()
        self._ports.cancel()

    @property
    def pairs(self) -> Pairs:
        return frozenset(self._partitions)

    def suspect(self, caller: WorkerHandle, message: PeerUnreachable) -> None:
        other = self._workers().get(message.worker)
        if other is not None and other is not caller and (caller, other) not in self._pending:
            pending = self._tasks.start(self._investigate(caller, other, message))
            self._pending[caller, other] = pending
            pending.add_done_callback(lambda done: self._pending.pop((caller, other)))

    async def settled(self) -> None:
        """Waits until all pending reports of broken links are confirmed or dismissed."""
        if self._pending:
            await asyncio.wait(tuple(self._pending.values()))

    def forget(self, name: str) -> None:
        pairs = [pair for pair in self._partitions if name in pair]
        for pair in pairs:
            del self._partitions[pair]
            self._probing.pop(pair).cancel()
        if pairs:
            self._on_change(self.pairs)

    async def _investigate(self, caller: WorkerHandle, other: WorkerHandle, message: PeerUnreachable) -> None:
        if await self._ports.is_found(caller, other, message.epoch):
            return
        found = {(caller, other)} if await self._confirm(caller, other, message.reason) else set()
        probed: set[_Direction] = set()
        while found:
            directions = self._candidates(found) - probed
            probed |= directions
            broken = await asyncio.gather(*(self._probe(*direction) for direction in directions))
            found = {direction for direction, is_broken in zip(directions, broken, strict=True) if is_broken}

    def _candidates(self, found: set[_Direction]) -> set[_Direction]:
        directions = {
            direction
            for direction in permutations(self._workers().values(), 2)
            if frozenset((direction[0].name, direction[1].name)) not in self._partitions
        }
        if len(directions) <= _MAX_PROBES:
            return directions
        ends = {worker for direction in found for worker in direction}
        return {direction for direction in directions if ends.intersection(direction)}

    async def _probe(self, caller: WorkerHandle, other: WorkerHandle) -> bool:
        try:
            why = await probe(caller, other, self._heartbeat_timeout_s)
        except (WorkerError, DeadlineError):
            return False
        return bool(why) and await self._confirm(caller, other, why)

    async def _confirm(self, caller: WorkerHandle, other: WorkerHandle, why: str) -> bool:
        """Records a broken link, unless a failed worker is the cause. Returns True if the record is new."""
        if not await other.is_responsive() or caller.loss is not None:
            return False
        pair = frozenset((caller.name, other.name))
        is_new = pair not in self._partitions
        if is_new:
            self._add(pair, f"workers {caller.name} and {other.name} cannot reach each other: {why}")
        self._partitions[pair].callers[caller.name] = other.name
        return is_new

    def _add(self, pair: Pair, why: str) -> None:
        self._partitions[pair] = _Partition(self._earlier_probes(pair))
        self._probing[pair] = self._tasks.start(self._probe_until_healed(pair))
        self._report(Notice(f"{why}; plans do not make them neighbours until the link works"))
        self._on_change(self.pairs)

    def _earlier_probes(self, pair: Pair) -> int:
        if pair not in self._healed:
            return 0
        healed_s, probes = self._healed[pair]
        return probes + 1 if asyncio.get_running_loop().time() - healed_s < _MEMORY_S else 0

    async def _probe_until_healed(self, pair: Pair) -> None:
        partition = self._partitions[pair]
        await asyncio.sleep(_BACKOFF.pause_s(partition.probes))
        while not await self._is_healed(partition):
            partition.probes += 1
            await asyncio.sleep(_BACKOFF.pause_s(partition.probes))
        del self._partitions[pair], self._probing[pair]
        self._healed[pair] = (asyncio.get_running_loop().time(), partition.probes)
        self._report(Notice(f"workers {' and '.join(sorted(pair))} reach each other again"))
        self._on_change(self.pairs)

    async def _is_healed(self, partition: _Partition) -> bool:
        workers = self._workers()
        try:
            for caller, other in tuple(partition.callers.items()):
                if await probe(workers[caller], workers[other], 2 * self._heartbeat_timeout_s):
                    return False
        except (WorkerError, DeadlineError, KeyError):
            return False
        return True

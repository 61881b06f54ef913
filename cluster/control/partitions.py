"""Pairs of workers that are both there and cannot reach each other: heard of, believed, remembered, tried again."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import permutations
from types import TracebackType
from typing import Self

from llamaclust.cluster.control.notices import cut_text, mended_text
from llamaclust.cluster.membership.worker_handle import WorkerHandle
from llamaclust.cluster.planner.adjacency import Pair, Pairs
from llamaclust.cluster.state.events import News, Watch
from llamaclust.core.errors import DeadlineError, WorkerError
from llamaclust.wire.control.messages import PeerUnreachable

_FIRST_PAUSE_S = 1.0
_LONGEST_PAUSE_S = 120.0
_LONGER = 1.5  # each time
_MEMORY_S = 600.0
"""A pair that breaks again within so long after it was mended is tried again after longer pauses than before."""

_MOST_TRIES = 256
"""All ways are tried at the same time where they are not more."""

Workers = Callable[[], Mapping[str, WorkerHandle]]
_Way = tuple[WorkerHandle, WorkerHandle]
"""From the first to the second."""


@dataclass(slots=True)
class _Cut:
    pause_s: float  # until it is tried again
    callers: dict[str, str] = field(default_factory=dict)  # who could not reach whom


class CutPairs:
    """A context manager: pairs are tried again while it is entered. A way that one of two cannot take is not used in
    either direction; it is mended when all can take it that could not."""

    def __init__(self, workers: Workers, worker_s: float, watch: Watch, on_change: Callable[[], None]) -> None:
        """`workers`: those who are there. `worker_s`: within it they show life, and say whether they reach another."""
        self._workers = workers
        self._worker_s = worker_s
        self._watch = watch
        self._on_change = on_change
        self._cuts: dict[Pair, _Cut] = {}
        self._mended: dict[Pair, tuple[float, float]] = {}  # (when, its last pause)
        self._doubts: dict[tuple[WorkerHandle, WorkerHandle], asyncio.Task[None]] = {}
        self._trials: dict[Pair, asyncio.Task[None]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for task in (*self._doubts.values(), *self._trials.values()):
            task.cancel()

    @property
    def apart(self) -> Pairs:
        return frozenset(self._cuts)

    def hear(self, caller: WorkerHandle, message: PeerUnreachable) -> None:
        """A worker says that it cannot reach another one."""
        other = self._workers().get(message.worker)
        if other is not None and other is not caller and (caller, other) not in self._doubts:
            doubt = asyncio.create_task(self._believe(caller, other, message.reason))
            self._doubts[caller, other] = doubt
            doubt.add_done_callback(lambda done: self._doubts.pop((caller, other)))

    async def settled(self) -> None:
        """Returns when all that was heard so far is believed or not: one who says it without end is not waited for."""
        if self._doubts:
            await asyncio.wait(tuple(self._doubts.values()))

    def forget(self, name: str) -> None:
        """A worker is lost; one that comes in its place may be somewhere else."""
        for pair in [pair for pair in self._cuts if name in pair]:
            del self._cuts[pair]
            self._trials.pop(pair).cancel()

    async def _believe(self, caller: WorkerHandle, other: WorkerHandle, why: str) -> None:
        """Where a way is cut, others may be as well, and would be found one after the other, each with a plan of its
        own: they are tried at the same time."""
        news = {(caller, other)} if await self._believes(caller, other, why) else set()
        tried: set[_Way] = set()
        while news:
            ways = self._ways(news) - tried
            tried |= ways
            cut = await asyncio.gather(*(self._find(*way) for way in ways))
            news = {way for way, is_cut in zip(ways, cut, strict=True) if is_cut}

    def _ways(self, news: set[_Way]) -> set[_Way]:
        """Those that may be cut as well: of many workers, those from and to the ones that are known to be cut off."""
        there = self._workers().values()
        ways = {way for way in permutations(there, 2) if frozenset((way[0].name, way[1].name)) not in self._cuts}
        if len(ways) <= _MOST_TRIES:
            return ways
        ends = {worker for way in news for worker in way}
        return {way for way in ways if ends.intersection(way)}

    async def _find(self, caller: WorkerHandle, other: WorkerHandle) -> bool:
        try:
            why = await caller.tries(other, self._worker_s)
        except (WorkerError, DeadlineError):
            return False
        return bool(why) and await self._believes(caller, other, why)

    async def _believes(self, caller: WorkerHandle, other: WorkerHandle, why: str) -> bool:
        """Remembers it; whether that is news. Only of one that is alive: one that has ended or hangs cannot be reached
        either."""
        if not await other.shows_life() or caller.loss is not None:
            return False
        pair = frozenset((caller.name, other.name))
        is_news = pair not in self._cuts
        if is_news:
            self._cuts[pair] = _Cut(self._first_pause_s(pair))
            self._trials[pair] = asyncio.create_task(self._try_again(pair))
            self._watch(News(cut_text(caller.name, other.name, why)))
            self._on_change()
        self._cuts[pair].callers[caller.name] = other.name
        return is_news

    def _first_pause_s(self, pair: Pair) -> float:
        mended_s, pause_s = self._mended.get(pair, (0.0, 0.0))
        if pause_s and asyncio.get_running_loop().time() - mended_s < _MEMORY_S:
            return min(_LONGER * pause_s, _LONGEST_PAUSE_S)
        return _FIRST_PAUSE_S

    async def _try_again(self, pair: Pair) -> None:
        cut = self._cuts[pair]
        await asyncio.sleep(cut.pause_s)
        while not await self._works(cut):
            cut.pause_s = min(_LONGER * cut.pause_s, _LONGEST_PAUSE_S)
            await asyncio.sleep(cut.pause_s)
        del self._cuts[pair], self._trials[pair]
        self._mended[pair] = (asyncio.get_running_loop().time(), cut.pause_s)
        self._watch(News(mended_text(*sorted(pair))))
        self._on_change()

    async def _works(self, cut: _Cut) -> bool:
        workers = self._workers()
        try:
            for caller, other in tuple(cut.callers.items()):
                if await workers[caller].tries(workers[other], 2 * self._worker_s):
                    return False
        except (WorkerError, DeadlineError, KeyError):
            return False
        return True

"""Waits for workers on other machines at the start. If some are missing, the start may continue without them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection
from contextlib import suppress
from dataclasses import dataclass

from llamaclust.cluster.membership.registry import Registry
from llamaclust.cluster.state.events import Notice, Report, Waiting, WorkerJoined
from llamaclust.core.errors import DeadlineError, LlamaclustError
from llamaclust.core.sizes import counted
from llamaclust.wire.rpc.deadlines import deadline

Shortfall = Callable[[bool], Awaitable[LlamaclustError | None]]
"""A function that returns an error if the present workers cannot hold the model, or None if they can. It counts drained
workers if its argument is True."""


@dataclass(frozen=True, slots=True)
class Awaited:
    """The workers that a start waits for: all in `names`, and at least `count` in total. After `grace_s` seconds
    without a new worker, the start continues if the present workers suffice, not counting drained ones. After `wait_s`
    seconds, drained workers count too, and the start fails if the present workers do not suffice."""

    names: tuple[str, ...]
    count: int
    grace_s: float
    wait_s: float

    def missing(self, present: Collection[str]) -> list[str]:
        names = [name for name in self.names if name not in present]
        others = self.count - len(present) - len(names)
        more = [counted(others, "more worker")] if others > 0 else []
        return [f"worker {name}" for name in names] + more


class Arrivals:
    def __init__(self, awaited: Awaited, registry: Registry, shortfall: Shortfall, report: Report) -> None:
        self._awaited = awaited
        self._registry = registry
        self._shortfall = shortfall
        self._report = report
        self._short: LlamaclustError | None = None

    async def wait(self) -> None:
        """Waits for the workers. Raises DeadlineError if too few have joined after `wait_s` seconds, and WorkerError if
        a worker ended before it joined."""
        wait_s = self._awaited.wait_s
        try:
            async with deadline("workers joining", wait_s):
                await self._enough()
        except DeadlineError as error:
            if self._registry.present and await self._suffice(with_drained=True):
                return
            missing, joined = ", ".join(self._missing), len(self._registry.present)
            others = f"; {joined} joined, which is not enough: {self._short}" if self._short else ""
            raise DeadlineError(f"workers did not join within {wait_s:g} s (`join.wait`): {missing}{others}") from error

    @property
    def _missing(self) -> list[str]:
        return self._awaited.missing(self._registry.present)

    async def _enough(self) -> None:
        clock = asyncio.get_running_loop().time
        seen: dict[str, int] = {}
        grace_end_s: float | None = None
        while True:
            self._registry.check_exits(self._awaited.names)
            present = {name: self._registry.joins[name] for name in self._registry.present}
            if present.items() - seen.items():
                self._report_joins(present, seen)
                grace_end_s = clock() + self._awaited.grace_s
            self._report_losses([name for name in seen if name not in present])
            seen = present
            if not self._missing:
                return
            if grace_end_s is not None and clock() >= grace_end_s:
                grace_end_s = None
                if await self._suffice(with_drained=False):
                    return
                continue  # Other workers may have joined during the check.
            with suppress(TimeoutError):
                async with asyncio.timeout_at(grace_end_s):
                    await self._registry.changed()

    def _report_joins(self, present: dict[str, int], seen: dict[str, int]) -> None:
        reported = set(seen)
        for name in present:
            reported.add(name)
            if seen.get(name) != present[name]:
                host = self._registry.workers[name].registration.host
                self._report(WorkerJoined(name, host, tuple(self._awaited.missing(reported))))

    def _report_losses(self, names: list[str]) -> None:
        losses = [f"worker {name} is lost: {self._registry.workers[name].loss}" for name in names]
        if losses and self._missing:
            self._report(Waiting("; ".join((", ".join(self._missing), *losses))))
        elif losses:
            self._report(Notice("; ".join(losses)))

    async def _suffice(self, *, with_drained: bool) -> bool:
        missing = ", ".join(self._missing)
        self._short = await self._shortfall(with_drained)
        if self._short is None:
            joined = len(self._registry.present)
            self._report(
                Notice(f"the start continues with {joined} of {self._awaited.count} workers, without {missing}")
            )
            return True
        self._report(Waiting(f"{missing}, because the present workers do not suffice: {self._short}"))
        return False

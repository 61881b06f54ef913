"""Limits how often ended workers are restarted. Pauses between restarts grow exponentially."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from llamaclust.cluster.launchers.base import GaveUp
from llamaclust.core.backoff import Backoff


@dataclass(frozen=True, slots=True)
class RestartLimits:
    """Limits of a worker's restarts: up to `most` within `within_s` seconds, with pauses that grow from `first_s`."""

    most: int = 6
    within_s: float = 60.0
    first_s: float = 0.1


class RestartPolicy:
    """Decides when ended workers may be restarted. The launcher restarts them (see `Launcher.restarting`)."""

    def __init__(self) -> None:
        self.limits = RestartLimits()
        self._gave_up: GaveUp | None = None
        self._begun, self._ended = asyncio.Event(), asyncio.Event()
        self._starts_s: dict[str, list[float]] = {}  # Times of recent restarts by worker.

    @property
    def is_on(self) -> bool:
        return self._gave_up is not None

    @contextmanager
    def on(self, gave_up: GaveUp) -> Iterator[None]:
        self._gave_up = gave_up
        self._begun.set()
        try:
            yield
        finally:
            self.end()

    def end(self) -> None:
        self._gave_up = None
        self._begun.set()
        self._ended.set()

    def give_up(self, name: str, why: str) -> None:
        if self._gave_up is not None:
            self._gave_up(name, why)

    def reset_restarts(self) -> None:
        self._starts_s.clear()

    async def may_restart(self, name: str, how: str) -> bool:
        """Waits until the worker may be restarted. Returns False if the worker must not be restarted."""
        await self._begun.wait()
        now_s, limits = asyncio.get_running_loop().time(), self.limits
        starts_s = [start_s for start_s in self._starts_s.get(name, ()) if start_s > now_s - limits.within_s]
        if len(starts_s) >= limits.most:
            self.give_up(name, f"{how}; it was restarted {limits.most} times within {limits.within_s:g} s")
            return False
        self._starts_s[name] = [*starts_s, now_s]
        backoff = Backoff(limits.first_s, limits.within_s)
        with suppress(TimeoutError):
            await asyncio.wait_for(self._ended.wait(), backoff.pause_s(len(starts_s) - 1) if starts_s else 0.0)
        return self.is_on

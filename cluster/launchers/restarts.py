"""Restarts of workers whose process ended: how often, with exponential backoff."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from llamaclust.cluster.launchers.base import GaveUp
from llamaclust.core.backoff import Backoff


@dataclass(frozen=True, slots=True)
class Restarts:
    """Limits: the first restart is immediate, later ones within `within_s` seconds back off."""

    most: int = 6
    within_s: float = 60.0
    first_s: float = 0.1

    def pause_s(self, before: int) -> float:
        """After `before` earlier restarts."""
        return Backoff(self.first_s, self.within_s).pause_s(before - 1) if before else 0.0


class Upkeep:
    """Workers of one launcher: see `Launcher.keeping_up`. It decides; the launcher starts them."""

    def __init__(self, limits: Restarts | None = None) -> None:
        self.limits = limits or Restarts()
        self._gave_up: GaveUp | None = None
        self._starts_s: dict[str, list[float]] = {}  # restarts of each worker

    @property
    def is_on(self) -> bool:
        return self._gave_up is not None

    @contextmanager
    def on(self, gave_up: GaveUp) -> Iterator[None]:
        """Meanwhile, workers are restarted; one that ends too often is given up."""
        self._gave_up = gave_up
        try:
            yield
        finally:
            self.end()

    def end(self) -> None:
        """No more restarts."""
        self._gave_up = None

    def give_up(self, name: str, why: str) -> None:
        if self._gave_up is not None:
            self._gave_up(name, why)

    def pause_s(self, name: str, how: str) -> float | None:
        """Until a worker is to be started again that has ended, and `how`. None: it is not, for that is over, or it
        ended too often, which is told."""
        if self._gave_up is None:
            return None
        now_s, limits = asyncio.get_running_loop().time(), self.limits
        starts_s = [start_s for start_s in self._starts_s.get(name, ()) if start_s > now_s - limits.within_s]
        if len(starts_s) >= limits.most:
            often = f"it was restarted {limits.most} times within {limits.within_s:g} s"
            self._gave_up(name, f"{how}; {often}")
            return None
        self._starts_s[name] = [*starts_s, now_s]
        return limits.pause_s(len(starts_s))

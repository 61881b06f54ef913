"""Workers that failed at an epoch's beginning again and again: plans do without them for a while, where they can. One
that joins again at once, as on a machine with a bad disk, would else fail the next plan, too."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping
from typing import Final, TypeVar

Handle = TypeVar("Handle")

_FIRST_S: Final = 10.0
_LONGEST_S: Final = 600.0
_MOST_DOUBLINGS: Final = 10


class LeftOut:
    """By name; twice as long after each failure. `may_change`: called when a worker's time is over."""

    def __init__(self, may_change: Callable[[], None]) -> None:
        self._may_change = may_change
        self._failures: dict[str, int] = {}
        self._until_s: dict[str, float] = {}

    def add(self, name: str) -> None:
        failures = self._failures.get(name, 0)
        self._failures[name] = failures + 1
        pause_s = min(_FIRST_S * 2 ** min(failures, _MOST_DOUBLINGS), _LONGEST_S)
        loop = asyncio.get_running_loop()
        until_s = self._until_s[name] = loop.time() + pause_s
        loop.call_at(until_s, self._end, name, until_s)

    def _end(self, name: str, until_s: float) -> None:
        if self._until_s.get(name) == until_s:
            del self._until_s[name]
            self._may_change()

    def forget(self, names: Collection[str]) -> None:
        """They took part in an epoch."""
        for name in names:
            self._failures.pop(name, None)
            self._until_s.pop(name, None)

    def others(self, workers: Mapping[str, Handle]) -> dict[str, Handle]:
        """Those that are not left out now."""
        return {name: one for name, one in workers.items() if name not in self._until_s}

"""Deadlines with names. Each await has its own deadline, so that the error says what did not arrive in time."""

from __future__ import annotations

import asyncio
from typing import Any, Self

from llamaclust.core.errors import DeadlineError


class deadline:  # noqa: N801  is used like the function asyncio.timeout
    """Limits the time of an `async with` body. After `seconds` seconds, raises a DeadlineError about `what`."""

    __slots__ = ("_limit", "_seconds", "_what", "_worker")

    def __init__(self, what: str, seconds: float, worker: str | None = None) -> None:
        self._worker = worker
        self._what = what
        self._seconds = seconds
        self._limit = asyncio.timeout(seconds)

    async def __aenter__(self) -> None:
        await self._limit.__aenter__()

    @property
    def is_expired(self) -> bool:
        return self._limit.expired()

    def move(self, at_s: float | None) -> None:
        """Moves the deadline to `at_s` on the event loop's clock, even into the past. None suspends the deadline."""
        self._limit.reschedule(at_s)

    async def __aexit__(self, *error: Any) -> None:
        try:
            await self._limit.__aexit__(*error)
        except TimeoutError as late:
            raise DeadlineError(f"{self._what} took longer than {self._seconds:g} s", worker=self._worker) from late


class recurring_deadline:  # noqa: N801  is used like `deadline`
    """A cheap deadline for each pass of a loop. Use `async with` around the loop and `with` around each pass. A pass
    that takes longer than `seconds` ends the loop with a DeadlineError. The error may come `seconds` / 8 late."""

    __slots__ = ("_begun_s", "_deadline", "_loop", "_seconds", "_timer")

    def __init__(self, what: str, seconds: float, worker: str | None = None) -> None:
        self._seconds = seconds
        self._deadline = deadline(what, seconds, worker)
        self._loop = asyncio.get_running_loop()
        self._begun_s: float | None = None
        self._timer: asyncio.TimerHandle | None = None

    async def __aenter__(self) -> Self:
        await self._deadline.__aenter__()
        self._deadline.move(None)
        self._look()
        return self

    async def __aexit__(self, *error: Any) -> None:
        if self._timer is not None:
            self._timer.cancel()
        await self._deadline.__aexit__(*error)

    def __enter__(self) -> None:
        self._begun_s = self._loop.time()

    def __exit__(self, *error: object) -> None:
        self._begun_s = None

    def _look(self) -> None:
        now_s = self._loop.time()
        if self._begun_s is not None and now_s - self._begun_s >= self._seconds:
            self._deadline.move(now_s)
        else:
            self._timer = self._loop.call_later(self._seconds / 8, self._look)

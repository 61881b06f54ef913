"""Every await has a deadline with a name of its own, so that what did not come can be said."""

from __future__ import annotations

import asyncio
from types import TracebackType

from llamaclust.errors import DeadlineError


class deadline:  # noqa: N801  reads as a statement, like asyncio.timeout
    """An async context manager that cancels its block after `seconds` and raises a DeadlineError that names `what`."""

    __slots__ = ("_limit", "_seconds", "_what")

    def __init__(self, what: str, seconds: float) -> None:
        self._what = what
        self._seconds = seconds
        self._limit = asyncio.timeout(seconds)

    async def __aenter__(self) -> None:
        await self._limit.__aenter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            await self._limit.__aexit__(kind, error, trace)
        except TimeoutError as late:
            raise DeadlineError(f"{self._what}: not within {self._seconds:g} s") from late

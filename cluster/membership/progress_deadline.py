"""A deadline that each progress report extends; its error says how far the worker was."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from llamaclust.core.errors import DeadlineError, StalledError
from llamaclust.core.sizes import mib
from llamaclust.wire.rpc.deadlines import deadline

Request = Callable[[deadline], Awaitable[Any]]
"""Awaits an answer until a limit."""


class ProgressDeadline:
    def __init__(self, what: str, timeout_s: float) -> None:
        self._what = what
        self._timeout_s = timeout_s
        self._limit = deadline(what, timeout_s)
        self._at = 0, 0

    def report(self, done_bytes: int, total_bytes: int) -> None:
        if self._limit.is_expired:
            return
        is_first = self._at == (0, 0) != (done_bytes, total_bytes)
        if is_first or done_bytes > self._at[0]:  # back and forth is no progress
            self._at = done_bytes, total_bytes
            self._limit.move(asyncio.get_running_loop().time() + self._timeout_s)

    async def wait(self, request: Request) -> Any:
        """The answer. StalledError where there is no progress for the timeout."""
        try:
            return await request(self._limit)
        except DeadlineError as error:
            done_bytes, total_bytes = self._at
            at = f"{mib(done_bytes)} of {mib(total_bytes)} MiB"
            raise StalledError(f"{self._what} for {self._timeout_s:g} s (timeouts.load): {at}") from error

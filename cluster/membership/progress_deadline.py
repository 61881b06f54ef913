"""Waits for an answer as long as it gets nearer, and says how far it was when it does not."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from llamaclust.core.errors import DeadlineError, StalledError
from llamaclust.core.sizes import mib
from llamaclust.wire.rpc.deadlines import deadline


class Further:
    """Waits for as long as an answer gets nearer."""

    def __init__(self, what: str, stall_s: float) -> None:
        self._what = what
        self._stall_s = stall_s
        self._limit = deadline(what, stall_s)
        self._at = 0, 0

    def hear(self, done_bytes: int, total_bytes: int) -> None:
        is_first = self._at == (0, 0) != (done_bytes, total_bytes)
        if is_first or done_bytes > self._at[0]:  # what only goes back and forth gets no nearer
            self._at = done_bytes, total_bytes
            self._limit.move(asyncio.get_running_loop().time() + self._stall_s)

    async def wait(self, ask: Callable[[deadline], Awaitable[Any]]) -> Any:
        try:
            return await ask(self._limit)
        except DeadlineError as error:
            done_bytes, total_bytes = self._at
            at = f"{mib(done_bytes)} of {mib(total_bytes)} MiB"
            raise StalledError(f"{self._what} for {self._stall_s:g} s (timeouts.load): {at}") from error

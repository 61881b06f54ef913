"""Runs disk calls on threads, because a call may hang forever, for example on an unreachable file server."""

from __future__ import annotations

import asyncio
import errno
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from llamaclust.core.errors import LlamaclustError

Value = TypeVar("Value")

_CALL_S = 10.0


class DiskThread:
    """Runs one call at a time on a daemon thread, with a deadline of 10 s. The process can end while a call hangs."""

    def __init__(self, name: str) -> None:
        self.hangs = False  # True while a call has not returned.
        self._name = name

    async def write(self, path: Path | None, work: Callable[[], None]) -> None:
        try:
            await self.call(work)
        except TimeoutError as error:
            raise LlamaclustError(f"{path}: cannot be written: {error.strerror}") from error

    async def call(self, work: Callable[[], Value]) -> Value:
        """Runs `work` on a thread. Raises its errors, and TimeoutError if this call or an earlier one hangs."""
        if self.hangs:
            raise TimeoutError(errno.ETIMEDOUT, "an earlier call has not returned")
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Value] = loop.create_future()
        thread = threading.Thread(target=self._run, args=(work, loop, answer), name=self._name, daemon=True)
        self.hangs = True
        try:
            thread.start()
        except RuntimeError:  # The system allows no more threads.
            self.hangs = False
            raise
        late = TimeoutError(errno.ETIMEDOUT, f"no answer within {_CALL_S:g} s")
        timer = loop.call_later(_CALL_S, _settle, answer, None, late)
        try:
            return await answer
        finally:
            timer.cancel()

    def _run(self, work: Callable[[], Value], loop: asyncio.AbstractEventLoop, answer: asyncio.Future[Value]) -> None:
        value, error = None, None
        try:
            value = work()
        except BaseException as raised:  # noqa: BLE001  the caller handles the error
            error = raised
        self.hangs = False
        with suppress(RuntimeError):  # The event loop may have been closed meanwhile.
            loop.call_soon_threadsafe(_settle, answer, value, error)


def _settle(answer: asyncio.Future[Any], value: Any, error: BaseException | None) -> None:
    if answer.done():
        return
    if error is None:
        answer.set_result(value)
    else:
        answer.set_exception(error)

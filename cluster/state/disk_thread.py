"""A thread for calls to a disk, which may hang for ever, as on a file server that is away."""

from __future__ import annotations

import asyncio
import errno
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, TypeVar

Value = TypeVar("Value")


class DiskThread:
    """One call at a time, each with a deadline. `close` it; a call that hangs does not keep the process alive."""

    def __init__(self, name: str, call_s: float) -> None:
        self._call_s = call_s
        self._calls: SimpleQueue[_Call | None] = SimpleQueue()
        self._is_busy = False
        threading.Thread(target=self._run, name=name, daemon=True).start()

    @property
    def hangs(self) -> bool:
        """Whether a call has not returned yet."""
        return self._is_busy

    async def call(self, work: Callable[[], Value]) -> Value:
        """Raises what `work` does. TimeoutError where it does not return in time, and while an earlier one has not."""
        if self.hangs:
            raise TimeoutError(errno.ETIMEDOUT, "an earlier call has not returned")
        self._is_busy = True
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Value] = loop.create_future()
        self._calls.put(_Call(work, loop, answer))
        late = TimeoutError(errno.ETIMEDOUT, f"no answer within {self._call_s:g} s")
        timer = loop.call_later(self._call_s, _settle, answer, None, late)
        try:
            return await answer
        finally:
            timer.cancel()

    def close(self) -> None:
        """The thread ends once its call has returned."""
        self._calls.put(None)

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            value, error = None, None
            try:
                value = call.work()
            except BaseException as raised:  # noqa: BLE001  the caller's
                error = raised
            self._is_busy = False
            with suppress(RuntimeError):  # the event loop was closed meanwhile
                call.loop.call_soon_threadsafe(_settle, call.answer, value, error)


@dataclass(frozen=True, slots=True)
class _Call:
    work: Callable[[], Any]
    loop: asyncio.AbstractEventLoop
    answer: asyncio.Future[Any]


def _settle(answer: asyncio.Future[Any], value: Any, error: BaseException | None) -> None:
    if answer.done():
        return
    if error is None:
        answer.set_result(value)
    else:
        answer.set_exception(error)

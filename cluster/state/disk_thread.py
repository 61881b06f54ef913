"""A thread for calls to a disk, which may hang for ever, as on a file server that is away."""

from __future__ import annotations

import asyncio
import errno
import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, TypeVar

Value = TypeVar("Value")


class DiskThread:
    """One call at a time, each with a deadline. `close` it; a call that hangs does not keep the process alive."""

    def __init__(self, name: str, call_s: float) -> None:
        self._call_s = call_s
        self._calls: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        self._last: Future[Any] | None = None
        threading.Thread(target=self._run, name=name, daemon=True).start()

    @property
    def hangs(self) -> bool:
        """Whether a call has not returned yet."""
        return self._last is not None and not self._last.done()

    async def call(self, work: Callable[[], Value]) -> Value:
        """Raises what `work` does. TimeoutError where it does not return in time, and while an earlier one has not."""
        if self.hangs:
            raise TimeoutError(errno.ETIMEDOUT, "an earlier call has not returned")
        future: Future[Value] = Future()
        future.set_running_or_notify_cancel()
        self._last = future
        self._calls.put((future, work))
        waiting = asyncio.wrap_future(future)
        done, _ = await asyncio.wait([waiting], timeout=self._call_s)
        if not done:
            waiting.cancel()
            raise TimeoutError(errno.ETIMEDOUT, f"no answer within {self._call_s:g} s")
        return waiting.result()

    def close(self) -> None:
        """The thread ends once its call has returned."""
        self._calls.put(None)

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            future, work = call
            try:
                value = work()
            except BaseException as error:  # noqa: BLE001  the caller's
                future.set_exception(error)
            else:
                future.set_result(value)


async def call_on_disk(name: str, call_s: float, work: Callable[[], Value]) -> Value:
    """A single call, on a thread of its own."""
    thread = DiskThread(name, call_s)
    try:
        return await thread.call(work)
    finally:
        thread.close()

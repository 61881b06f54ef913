"""Whether nothing came for a while."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Silence:
    """Watches one wait after the other. Waits are shorter than the silence as a rule: one timer serves many, for to set
    and cancel one for each takes longer than what is awaited."""

    def __init__(self, wake: Callable[[], None]) -> None:
        """`wake` is called when a wait has been too long."""
        self.is_over = False  # the wait has been
        self._wake = wake
        self._end_s = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def begin(self, idle_s: float) -> None:
        """A wait begins, which is too long after that time."""
        loop = asyncio.get_running_loop()
        self.is_over, self._end_s = False, loop.time() + idle_s
        if self._timer is None:
            self._timer = loop.call_at(self._end_s, self._look, loop)

    def end(self) -> None:
        """No more waits."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        if loop.time() < self._end_s:
            self._timer = loop.call_at(self._end_s, self._look, loop)
        else:
            self.is_over = True
            self._wake()

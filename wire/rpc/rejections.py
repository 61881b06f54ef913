"""Logs refused peers in a limited number of lines, so that connection attempts cannot fill a disk."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Iterator
from contextlib import contextmanager

from llamaclust.core.bounds import one_line
from llamaclust.wire.rpc.silent_connections import MAX_SILENT_OF_HOST, SilentConnections

HANDSHAKE_S = 10.0  # Maximum duration of a handshake.
_REMEMBERED = 4096
_TOLD_S = 0.5  # Additional time after HANDSHAKE_S in which a call may arrive.
_LOOK_S = 0.25  # Interval between two checks for connections that have shown no certificate.
_MOST = 20
_SECONDS = 60.0


class RefusalLog:
    """Logs at most 20 lines a minute, with at least `apart_s` seconds between two lines. Counts omitted lines."""

    def __init__(self, log: logging.Logger, apart_s: float = 0.0, level: int = logging.WARNING) -> None:
        self.log = log
        self._level = level
        self._apart_s = apart_s
        self._told_at_s: deque[float] = deque(maxlen=_MOST)
        self._omitted = 0

    def tell(self, text: str) -> None:
        now_s = time.monotonic()
        told_s = self._told_at_s
        if (len(told_s) == _MOST and now_s - told_s[0] < _SECONDS) or (told_s and now_s - told_s[-1] < self._apart_s):
            self._omitted += 1
            return
        told_s.append(now_s)
        more = f" (and {self._omitted} more like this)" if self._omitted else ""
        self._omitted = 0
        self.log.log(self._level, "refused: %s%s", one_line("".join(c for c in text if c.isprintable())), more)


class Handshakes:
    """Watches the TLS handshakes of one server. A connection on which no call arrives in time is logged as refused."""

    def __init__(self, address: str, limit_s: float, refusals: RefusalLog) -> None:
        self._address = address
        self._due_s = limit_s + _TOLD_S
        self._refusals = refusals
        # Port scans and load balancers connect like this. A warning would replace the last error of a worker.
        self._strangers = RefusalLog(refusals.log, level=logging.INFO)
        self._loop = asyncio.get_running_loop()
        self._calls = Counter[str]()  # Number of calls in progress, by caller.
        # Earlier callers without a call in progress, in the order in which their calls ended.
        self._callers: OrderedDict[str, None] = OrderedDict()
        self._begun = self._due = self._answered = self._told = 0
        self._is_closed = False
        self._silent = SilentConnections()
        self._closing: asyncio.Task[None] | None = None
        self.port = 0  # Set when the server listens.

    def begun(self) -> None:
        """Counts a handshake. Threads of gRPC call this."""
        with contextlib.suppress(RuntimeError):  # The event loop has ended, and no more lines are logged.
            self._loop.call_soon_threadsafe(self._count)

    def _count(self) -> None:
        self._begun += 1
        self._loop.call_later(self._due_s, self._judge)
        if self._is_crowded and self._closing is None and not self._is_closed:
            self._closing = asyncio.create_task(self._close_silent())

    @property
    def _is_crowded(self) -> bool:
        return self._begun - max(self._answered, self._due) > MAX_SILENT_OF_HOST

    async def _close_silent(self) -> None:
        closed = left = 0
        try:
            while (self._is_crowded or left > MAX_SILENT_OF_HOST) and not self._is_closed:
                await asyncio.sleep(_LOOK_S)
                # No file descriptor was free. The next pass of the loop tries again.
                with contextlib.suppress(OSError):
                    callers = frozenset((*self._calls, *self._callers))
                    count, left = await asyncio.to_thread(self._silent.close_excess, self.port, callers)
                    closed += count
        finally:
            self._closing = None
        if closed:
            self._refusals.tell(f"{closed} connections to {self._address}: too many that showed no certificate")

    @contextmanager
    def call(self, caller: str) -> Iterator[None]:
        """Counts a call in progress. `caller` is gRPC's name of the peer, which has shown a certificate."""
        if caller not in self._calls and caller not in self._callers:
            self._answered += 1
        self._callers.pop(caller, None)
        self._calls[caller] += 1
        try:
            yield
        finally:
            self._calls[caller] -= 1
            if not self._calls[caller]:
                del self._calls[caller]
                self._callers[caller] = None
                if len(self._callers) > _REMEMBERED:
                    self._callers.popitem(last=False)

    def _judge(self) -> None:
        self._due += 1
        if self._due - self._answered > self._told and not self._is_closed:
            self._told += 1
            self._strangers.tell(f"a connection to {self._address}: no certificate of this cluster was shown")

    def close(self) -> None:
        self._is_closed = True

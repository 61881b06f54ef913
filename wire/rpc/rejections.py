"""Refused peers in the log: a line each, of a bounded number, so that connection attempts cannot fill a disk."""

from __future__ import annotations

import logging
import time
from collections import deque

from llamaclust.core.bounds import one_line

_MOST = 20
_SECONDS = 60.0


class RefusalLog:
    """At most 20 lines a minute; what was left out is counted in the next line."""

    def __init__(self, log: logging.Logger) -> None:
        self._log = log
        self._told_at_s: deque[float] = deque(maxlen=_MOST)
        self._omitted = 0

    def tell(self, text: str) -> None:
        now_s = time.monotonic()
        if len(self._told_at_s) == _MOST and now_s - self._told_at_s[0] < _SECONDS:
            self._omitted += 1
            return
        self._told_at_s.append(now_s)
        more = f" (and {self._omitted} more like this)" if self._omitted else ""
        self._omitted = 0
        self._log.warning("refused: %s%s", one_line("".join(c for c in text if c.isprintable())), more)

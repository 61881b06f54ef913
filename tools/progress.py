from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int | None], None]
"""Receives the name of a step, the finished amount (bytes or pieces), and the total, or None if it is unknown."""


def silent(what: str, done: int, total: int | None) -> None:
    """Shows nothing."""


class ByteProgress:
    def __init__(self, progress: Progress, total_bytes: int) -> None:
        self._progress, self._total_bytes, self._done_bytes = progress, total_bytes, 0

    def add(self, what: str, n_bytes: int) -> None:
        self._done_bytes += n_bytes
        self._progress(what, self._done_bytes, self._total_bytes)

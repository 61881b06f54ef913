"""Progress of a load that compiles kernels while it uploads weights."""

from __future__ import annotations

from threading import Lock

from llamaclust.kernels.backend import Progress

_KERNELS_SHARE = 10


class LoadProgress:
    """Reports all weight bytes; 1 / `_KERNELS_SHARE` of them as modules are compiled, so that a load that waits for the
    compiler makes progress. Thread-safe."""

    def __init__(self, progress: Progress, total_bytes: int, modules: int) -> None:
        self._progress = progress
        self._total_bytes = total_bytes
        self._modules = self._modules_left = modules
        self._uploaded_bytes = self._reported_bytes = 0
        self._lock = Lock()

    def add_bytes(self, n_bytes: int) -> None:
        """Counts uploaded weights."""
        with self._lock:
            self._uploaded_bytes += n_bytes
            self._report()

    def module_done(self) -> None:
        with self._lock:
            self._modules_left -= 1
            self._report()

    def _report(self) -> None:
        withheld = self._total_bytes * self._modules_left // (_KERNELS_SHARE * max(1, self._modules))
        known = min(self._uploaded_bytes, self._total_bytes - withheld)
        if known > self._reported_bytes:
            more, self._reported_bytes = known - self._reported_bytes, known
            self._progress(more)

"""How far a load is whose kernels are compiled while its weights are brought."""

from __future__ import annotations

from threading import Lock

from llamaclust.kernels.backend import Progress

_KERNELS_SHARE = 10


class LoadProgress:
    """Tells of all bytes in the end, one part in `_KERNELS_SHARE` of them as kernels are there: so that a load which
    waits for a compiler is seen to get further. For several threads."""

    def __init__(self, progress: Progress, total_bytes: int, modules: int) -> None:
        self._progress = progress
        self._total_bytes = total_bytes
        self._modules = self._modules_left = modules
        self._there_bytes = self._told_bytes = 0
        self._lock = Lock()

    def add_bytes(self, n_bytes: int) -> None:
        """Of weights that are there."""
        with self._lock:
            self._there_bytes += n_bytes
            self._tell()

    def module_done(self) -> None:
        with self._lock:
            self._modules_left -= 1
            self._tell()

    def _tell(self) -> None:
        withheld = self._total_bytes * self._modules_left // (_KERNELS_SHARE * max(1, self._modules))
        known = min(self._there_bytes, self._total_bytes - withheld)
        if known > self._told_bytes:
            more, self._told_bytes = known - self._told_bytes, known
            self._progress(more)

"""Shows a worker's readiness to a supervisor such as a kubelet, with a file that exists while the worker is ready."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

from llamaclust.worker.service import StageService

IDLE_S = 10.0
"""Seconds without a load or a measurement after which a worker counts as idle."""
_PERIOD_S = 1.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Readiness:
    """Maintains a file that exists while the worker is ready: it is not loading, and it has layers or is idle."""

    file: Path | None = None  # None if no file is wanted.

    def __post_init__(self) -> None:
        """Removes a file that an earlier process left."""
        self._show(False)

    async def follow(self, exclusive: asyncio.Lock, service: StageService) -> None:
        if self.file is None:
            return
        busy_at, is_told = monotonic(), False
        try:
            while True:
                if exclusive.locked():
                    busy_at = monotonic()
                is_idle = monotonic() - busy_at >= IDLE_S
                try:
                    self._show(not exclusive.locked() and (service.holds_layers or is_idle))
                    is_told = False
                except OSError as error:  # For example, the disk is full.
                    if not is_told:
                        _log.warning("%s: readiness cannot be shown: %s", self.file, error.strerror)
                    is_told = True
                await asyncio.sleep(_PERIOD_S)
        finally:
            self._show(False)

    def _show(self, is_ready: bool) -> None:
        if self.file is None:
            return
        if is_ready:
            self.file.touch()
        else:
            self.file.unlink(missing_ok=True)

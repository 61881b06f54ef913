"""What clients may change of a running cluster: which workers hold layers, and a model's adapters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from llamaclust.wire.control.logs import LogTail


class DrainControl(Protocol):
    """Decides which workers hold layers, and reads their logs."""

    async def drain(self, name: str) -> None: ...
    def undrain(self, name: str) -> None: ...
    async def log(self, name: str) -> LogTail: ...


class AdapterControl(Protocol):
    """Loads and unloads adapters of a model while it is served."""

    async def load(self, name: str, path: str) -> None: ...
    async def unload(self, name: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Controls:
    """Without one of them, its endpoints are not there, or refuse."""

    workers: DrainControl | None = None
    adapters: AdapterControl | None = None

"""Base class of launchers. A launcher starts worker processes, watches them and ends them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from typing import Self

from llamaclust.cluster.launchers.arrivals import Shortfall
from llamaclust.cluster.membership.join_rules import Certify
from llamaclust.cluster.membership.registry import Registry
from llamaclust.model.loader import Model
from llamaclust.wire.security.credentials import Credentials
from llamaclust.worker.settings import WorkerSettings

Exited = Callable[[str, str], None]
GaveUp = Callable[[str, str], None]


class Launcher(ABC):
    """A launcher of a cluster's workers. The default methods are for workers on other machines."""

    listen: str
    credentials: Credentials
    certify: Certify | None = None
    coordinator_s = 0.0
    """Seconds that workers wait for a lost coordinator to come back."""

    @abstractmethod
    def check(self, workers: Sequence[WorkerSettings], model: Model) -> None:
        """Raises UsageError or ModelFileError if it is certain that a worker cannot run the model."""

    def missing(self, present: Collection[str]) -> list[str]:
        """Returns a text such as "worker b" for each worker in the cluster file that is not present."""
        return []

    def refusal(self, name: str) -> str | None:
        """Returns the reason to refuse a worker with this name, or None if the worker may join."""
        return None

    @abstractmethod
    async def start(self, workers: Sequence[WorkerSettings], join: str, exited: Exited) -> None:
        """Starts all workers, which join at the address `join`. Calls `exited` if a worker ends before `stop`."""

    @abstractmethod
    async def joined(self, registry: Registry, shortfall: Shortfall) -> None:
        """Waits until all workers have joined, or the present workers suffice according to `shortfall`. Raises
        DeadlineError, or WorkerError if a worker ended."""

    @abstractmethod
    async def stop(self) -> None:
        """Ends all workers. Returns when they have ended."""

    @abstractmethod
    def restarting(self, gave_up: GaveUp) -> AbstractContextManager[None]:
        """Restarts ended workers while the context is open. Calls `gave_up` for a worker that it stops restarting."""

    @abstractmethod
    def reset_restarts(self) -> None: ...

    @abstractmethod
    async def end(self, name: str) -> None:
        """Ends the process of a lost worker if the launcher can reach it. Returns when the process has ended."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.stop()

    def free_memory_bytes(self) -> int | None:
        """Returns the bytes that all workers together may use on this machine, or None if they run elsewhere."""
        return None

    @abstractmethod
    def last_error(self, name: str, silent_s: float) -> str:
        """Returns the last error in a worker's log, or an empty text if the worker logged it more than a few seconds
        before its last sign of life, `silent_s` seconds ago."""

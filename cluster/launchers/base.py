"""Base class of the launchers. A launcher starts worker processes, watches them and ends them."""

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
    """Launcher of a cluster's workers. Default attributes and methods suit workers on other machines."""

    listen: str
    credentials: Credentials
    certify: Certify | None = None
    coordinator_s = 0.0
    """Seconds that workers wait for a lost coordinator to come back."""

    @abstractmethod
    def check(self, workers: Sequence[WorkerSettings], model: Model) -> None:
        """Raises UsageError or ModelFileError if a worker certainly cannot run the model."""

    def missing(self, present: Collection[str]) -> list[str]:
        """Returns a description of each worker in the cluster file that is not present."""
        return []

    def refusal(self, name: str) -> str | None:
        """Returns the reason to refuse a worker with this name, or None if it may join."""
        return None

    @abstractmethod
    async def start(self, workers: Sequence[WorkerSettings], join: str, exited: Exited) -> None:
        """Starts all workers. They join at the address `join`. `exited` is called if a worker ends before `stop`."""

    @abstractmethod
    async def joined(self, registry: Registry, shortfall: Shortfall) -> None:
        """Waits until all workers have joined, or enough of them. Raises DeadlineError, or an ended worker's error."""

    @abstractmethod
    async def stop(self) -> None:
        """Ends all workers, and returns when they have ended."""

    @abstractmethod
    def restarting(self, gave_up: GaveUp) -> AbstractContextManager[None]:
        """Restarts ended workers while the context is open. Calls `gave_up` when it stops restarting a worker."""

    @abstractmethod
    def reset_restarts(self) -> None:
        """Resets the restart counts. It is called when a request, and not the workers, caused the workers to end."""

    @abstractmethod
    async def end(self, name: str) -> None:
        """Ends a lost worker's process if the launcher can reach it, and returns when the process has ended."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.stop()

    def free_memory_bytes(self) -> int | None:
        """Returns the bytes that all workers together may take on this machine, or None if they run elsewhere."""
        return None

    @abstractmethod
    def last_error(self, name: str) -> str:
        """Returns the last error in a worker's log, or an empty text."""

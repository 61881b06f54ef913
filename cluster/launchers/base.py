"""The base class of launchers, which start worker processes, watch them and end them."""

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
    """The workers of one cluster. Defaults are those for workers on other machines."""

    listen: str
    credentials: Credentials
    certify: Certify | None = None
    coordinator_s = 0.0
    """The seconds that workers wait for a lost coordinator to return."""

    @abstractmethod
    def check(self, workers: Sequence[WorkerSettings], model: Model) -> None:
        """Raises UsageError or ModelFileError if a worker is known to be unable to run the model."""

    def missing(self, present: Collection[str]) -> list[str]:
        """Returns a text for each worker of the cluster file that is not present."""
        return []

    def refusal(self, name: str) -> str | None:
        """Returns the reason why a worker with this name may not join, or None."""
        return None

    @abstractmethod
    async def start(self, workers: Sequence[WorkerSettings], join: str, exited: Exited) -> None:
        """Starts all workers, which join at the address `join`. `exited` is called if a worker ends before `stop`."""

    @abstractmethod
    async def joined(self, registry: Registry, shortfall: Shortfall) -> None:
        """Waits for all workers, or for enough if others do not appear. Raises DeadlineError, or a worker's error."""

    @abstractmethod
    async def stop(self) -> None:
        """Ends all workers and returns when they are gone."""

    @abstractmethod
    def restarting(self, gave_up: GaveUp) -> AbstractContextManager[None]:
        """Restarts ended workers while the context is open, if possible. Calls `gave_up` for a worker given up."""

    @abstractmethod
    def reset_restarts(self) -> None:
        """Resets the counts of restarts. It is called when a request turns out to be the reason why workers ended."""

    @abstractmethod
    async def end(self, name: str) -> None:
        """Ends the process of a lost worker if it can be reached, and returns when the process has ended."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.stop()

    def free_memory_bytes(self) -> int | None:
        """Returns the bytes that all workers on this machine may take together. None if they run elsewhere."""
        return None

    @abstractmethod
    def last_error(self, name: str) -> str:
        """Returns the last error that a worker logged, or ""."""

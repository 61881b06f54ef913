"""What every launcher does: it starts worker processes somewhere, watches them and ends them."""

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
"""Called with a worker's name and how its process ended, such as "killed by signal 9 (SIGKILL)"."""
GaveUp = Callable[[str, str], None]
"""Called with a worker's name and why it is not started again."""


class Launcher(ABC):
    """Workers of one cluster from start to stop, where they join and how they are known. The defaults are those of
    workers on other machines."""

    listen: str
    """Of the coordinator, as gRPC names it."""
    credentials: Credentials
    certify: Certify | None = None
    coordinator_s = 0.0
    """How long workers wait for a coordinator that is gone."""

    @abstractmethod
    def check(self, workers: Sequence[WorkerSettings], model: Model) -> None:
        """UsageError or ModelFileError where it is known before a start that a worker cannot run the model."""

    def missing(self, present: Collection[str]) -> list[str]:
        """Workers of the cluster file beside those that are present, in words."""
        return []

    def refusal(self, name: str) -> str | None:
        """Why a worker of this name is none of the cluster's; None where it is."""
        return None

    @abstractmethod
    async def start(self, workers: Sequence[WorkerSettings], join: str, exited: Exited) -> None:
        """Starts all; they register with the coordinator at `join`. `exited` gets every end but `stop`'s."""

    @abstractmethod
    async def joined(self, registry: Registry, shortfall: Shortfall) -> None:
        """Waits until all are members, or as many as suffice where others stay away. DeadlineError names the missing
        ones, WorkerError one that ended before."""

    @abstractmethod
    async def stop(self) -> None:
        """Ends all and returns when they are gone."""

    @abstractmethod
    def restarting(self, gave_up: GaveUp) -> AbstractContextManager[None]:
        """Meanwhile, a worker whose process ended or ends is started again, if this launcher is one that can."""

    @abstractmethod
    def reset_restarts(self) -> None:
        """Workers ended because of a request that has failed: these ends count no more."""

    @abstractmethod
    async def end(self, name: str) -> None:
        """Ends the process of a worker that is lost, if it is still there and can be reached; returns when it has."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.stop()

    def free_memory_bytes(self) -> int | None:
        """What its workers may take of this machine, all together; None where they are elsewhere."""
        return None

    @abstractmethod
    def last_error(self, name: str) -> str:
        """The last trouble that a worker logged; empty where there was none."""

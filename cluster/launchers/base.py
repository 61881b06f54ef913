"""What every launcher does: it starts worker processes somewhere, watches them and ends them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from llamaclust.cluster.config.cluster_config import ClusterConfig
from llamaclust.cluster.membership.registry import Certify, RefusalReason, Registry
from llamaclust.model.loader import Model
from llamaclust.wire.security.credentials import Credentials
from llamaclust.worker.settings import WorkerSettings

Exited = Callable[[str, str], None]
"""Called with a worker's name and how its process ended, such as "killed by signal 9 (SIGKILL)"."""


GaveUp = Callable[[str, str], None]
"""Called with a worker's name and why it is not started again."""


class Launcher(Protocol):
    """Workers of one cluster, from start to stop."""

    def check(self, workers: Sequence[WorkerSettings], model: Model) -> None:
        """UsageError or ModelFileError where it is known before a start that a worker cannot run the model."""
        ...

    async def start(self, workers: Sequence[WorkerSettings], join: str, exited: Exited) -> None:
        """Starts all; they register with the coordinator at `join`. `exited` hears of every end but `stop`'s."""
        ...

    async def stop(self) -> None:
        """Ends all and returns when they are gone."""
        ...

    def keeping_up(self, gave_up: GaveUp) -> AbstractContextManager[None]:
        """Meanwhile, a worker whose process ended or ends is started again, if this launcher is one that can."""
        ...

    async def end(self, name: str) -> None:
        """Ends the process of a worker that is lost, if it is still there and can be reached; returns when it has."""
        ...

    def free_memory_bytes(self) -> int | None:
        """What its workers may take of this machine, all together; None where they are elsewhere."""
        ...

    def last_error(self, name: str) -> str:
        """The last trouble that a worker logged; empty where there was none."""
        ...


@dataclass(frozen=True, slots=True)
class Launch:
    """A launcher, where its workers join and how they are known.

    `joined` waits until all that are needed are members, and returns the cluster file with those workers in it.
    """

    launcher: Launcher
    listen: str  # gRPC target of the coordinator
    credentials: Credentials
    joined: Callable[[Registry], Awaitable[ClusterConfig]]
    refusal: RefusalReason | None = None
    certify: Certify | None = None
    coordinator_s: float = 0.0  # how long workers wait for a coordinator that is gone

"""How the workers of a cluster file come to be: its launcher, and what that one brings with it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from llamaclust.cluster.config.cluster_config import ClusterConfig
from llamaclust.cluster.launchers.base import Launcher
from llamaclust.cluster.launchers.local import LocalLauncher
from llamaclust.cluster.launchers.run_directory import run_directory
from llamaclust.cluster.membership.registry import Certify, Registry, Welcomes
from llamaclust.cluster.state.directory import ClusterDir
from llamaclust.cluster.state.events import Watch
from llamaclust.wire.security.credentials import Credentials

_JOIN_S = 60.0


@dataclass(frozen=True, slots=True)
class Launch:
    """A launcher, where its workers join and how they are known.

    `joined` waits until all that are needed are members, and returns the cluster file with those workers in it.
    """

    launcher: Launcher
    listen: str  # gRPC target of the coordinator
    credentials: Credentials
    joined: Callable[[Registry], Awaitable[ClusterConfig]]
    welcomes: Welcomes = lambda name: None
    certify: Certify | None = None
    coordinator_s: float = 0.0  # how long workers wait for a coordinator that is gone


@contextmanager
def launching(config: ClusterConfig, folder: ClusterDir, watch: Watch) -> Iterator[Launch]:
    """What the launcher needs on disk is there meanwhile. The caller holds `folder`'s lock."""
    if config.launcher == "static":
        from llamaclust.cluster.launchers.static import static_launch

        yield static_launch(config, folder, watch)
        return
    if config.launcher == "ray":
        from llamaclust.cluster.launchers.ray import ray_launch

        yield ray_launch(config, folder, watch)
        return
    if config.launcher == "mpi":
        from llamaclust.cluster.launchers.mpi import mpi_launch

        yield mpi_launch(config, folder, watch)
        return
    with run_directory(folder.path) as run:

        async def joined(registry: Registry) -> ClusterConfig:
            await registry.wait_for([worker.name for worker in config.workers], _JOIN_S)
            return config

        yield Launch(LocalLauncher(run, folder.logs), run.coordinator, run.token, joined)

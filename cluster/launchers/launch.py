"""How the workers of a cluster file come to be: its launcher, and what that one brings with it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from llamaclust.cluster.config.cluster_config import ClusterConfig
from llamaclust.cluster.launchers.base import Launch
from llamaclust.cluster.launchers.local import LocalLauncher
from llamaclust.cluster.launchers.run_directory import run_directory
from llamaclust.cluster.membership.registry import Registry
from llamaclust.cluster.state.directory import ClusterDir
from llamaclust.cluster.state.events import Report

_JOIN_S = 60.0


@contextmanager
def launching(config: ClusterConfig, folder: ClusterDir, report: Report) -> Iterator[Launch]:
    """What the launcher needs on disk is there meanwhile. The caller holds `folder`'s lock."""
    if config.launcher == "static":
        from llamaclust.cluster.launchers.static import static_launch

        yield static_launch(config, folder, report)
        return
    if config.launcher == "ray":
        from llamaclust.cluster.launchers.ray import ray_launch

        yield ray_launch(config, folder, report)
        return
    if config.launcher == "mpi":
        from llamaclust.cluster.launchers.mpi import mpi_launch

        yield mpi_launch(config, folder, report)
        return
    with run_directory(folder.path) as run:

        async def joined(registry: Registry) -> ClusterConfig:
            await registry.wait_for([worker.name for worker in config.workers], _JOIN_S)
            return config

        yield Launch(LocalLauncher(run, folder.logs), run.coordinator, run.token, joined)

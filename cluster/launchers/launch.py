"""How the workers of a cluster file come to be: its launcher, and what that one brings with it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from llamaclust.cluster.config.cluster_config import ClusterConfig
from llamaclust.cluster.launchers.base import Launcher
from llamaclust.cluster.launchers.local import LocalLauncher
from llamaclust.cluster.launchers.run_directory import run_directory
from llamaclust.cluster.state.directory import ClusterDir
from llamaclust.cluster.state.events import Report


@contextmanager
def launching(config: ClusterConfig, folder: ClusterDir, report: Report) -> Iterator[Launcher]:
    """What the launcher needs on disk is there meanwhile. The caller holds `folder`'s lock."""
    match config.launcher:
        case "local":
            with run_directory(folder.path) as run:
                yield LocalLauncher(run, folder.logs)
        case "static":
            from llamaclust.cluster.launchers.static import StaticLauncher

            yield StaticLauncher(config, folder, report)
        case "ray":
            from llamaclust.cluster.launchers.ray import RayLauncher

            yield RayLauncher(config, folder, report)
        case "mpi":
            from llamaclust.cluster.launchers.mpi import MpiLauncher

            yield MpiLauncher(config, folder, report)

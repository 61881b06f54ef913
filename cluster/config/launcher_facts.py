"""Lists the properties in which launchers differ. Other modules use these properties instead of launcher names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

LauncherName = Literal["local", "static", "ray", "mpi"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LauncherFacts:
    is_local: bool = False  # Workers are child processes of the coordinator.
    starts_workers: bool = True  # False if users start the workers, with their own settings.
    workers_outlive: bool = False  # Workers keep running while their coordinator is lost.
    is_one_program: bool = False  # mpirun starts coordinator and workers together, and binds them to cores.
    uses_ray: bool = False  # Ray reserves CPUs and GPUs for each worker.


LAUNCHERS: Mapping[LauncherName, LauncherFacts] = {
    "local": LauncherFacts(is_local=True),
    "static": LauncherFacts(starts_workers=False, workers_outlive=True),
    "ray": LauncherFacts(workers_outlive=True, uses_ray=True),
    "mpi": LauncherFacts(is_one_program=True),
}

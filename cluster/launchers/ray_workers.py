"""Manages the placement group and the actors of a cluster in Ray. All calls block."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from llamaclust.core.errors import LlamaclustError, UsageError
from llamaclust.worker.settings import WorkerSettings

_CALL_S = 10.0
_GONE_S = 10.0
_POLL_S = 0.05
_READY_S = 0.05


class RayWorkers:
    def __init__(self, library: Any, cluster: str) -> None:
        self._ray = library
        self._cluster = cluster
        self._group: Any = None
        self.actors: dict[str, Any] = {}

    def take_back(self, wanted: Sequence[Any]) -> bool:
        """Takes over the actors of an earlier coordinator if they have the wanted arguments. Otherwise removes them and
        returns False. Raises UsageError if they belong to another cluster."""
        names = self._names()
        found = {name: self._request(name, "given") for name in names}
        if any(given is not None and given.cluster != self._cluster for given in found.values()):
            why = "has actors of another cluster with the same name"
            raise UsageError(f"the Ray cluster {why}; choose another `name:`, or stop the other cluster first")
        if found == {given.settings.name: given for given in wanted} and not any(
            self._request(name, "is_over") for name in names
        ):
            self.actors = {name: self._ray.get_actor(name) for name in names}
            return True
        self.remove()
        return False

    def reserve(self, workers: Sequence[WorkerSettings], strategy: str) -> None:
        """Requests a place for each worker. `is_ready` returns True when all places are reserved."""
        from llamaclust.cluster.launchers.ray_actor import PLACEMENT

        bundles = [resources(worker) for worker in workers]
        make = self._ray.util.placement_group
        self._group = make(bundles, strategy=strategy, name=PLACEMENT, lifetime="detached")

    def is_ready(self) -> bool:
        return bool(self._group.wait(_READY_S))

    def free(self) -> Mapping[str, float]:
        free: dict[str, float] = self._ray.available_resources()
        return free

    def make(self, wanted: Sequence[Any]) -> None:
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        from llamaclust.cluster.launchers.ray_actor import CONCURRENCY, WorkerActor

        for index, given in enumerate(wanted):
            room = resources(given.settings)
            options = {
                "name": given.settings.name,
                "lifetime": "detached",
                "max_restarts": -1,
                "max_concurrency": CONCURRENCY,
                "num_cpus": room["CPU"],
                "num_gpus": room.get("GPU", 0),
                "memory": room.get("memory"),
                "scheduling_strategy": PlacementGroupSchedulingStrategy(
                    self._group, placement_group_bundle_index=index
                ),
            }
            self.actors[given.settings.name] = self._ray.remote(WorkerActor).options(**options).remote(given)

    def restart(self, name: str) -> None:
        self._ray.kill(self.actors[name], no_restart=False)

    def forget(self, name: str) -> None:
        self._ray.kill(self.actors[name])

    def remove(self) -> None:
        """Removes all actors and their placement group. Raises LlamaclustError if an actor does not end in time."""
        from llamaclust.cluster.launchers.ray_actor import PLACEMENT

        with suppress(ValueError):  # There is no placement group with this name.
            self._ray.util.remove_placement_group(self._group or self._ray.util.get_placement_group(PLACEMENT))
        self._group = None
        for name in self._names():
            with suppress(ValueError):
                self._ray.kill(self._ray.get_actor(name))
        end = time.monotonic() + _GONE_S
        while names := self._names():
            if time.monotonic() > end:
                raise LlamaclustError(f"Ray has not removed these actors within {_GONE_S:g} s: {', '.join(names)}")
            time.sleep(_POLL_S)

    def _names(self) -> list[str]:
        return sorted(self._ray.util.list_named_actors())

    def _request(self, name: str, method: str) -> Any:
        from ray.exceptions import RayError

        with suppress(RayError, ValueError):
            return self._ray.get(getattr(self._ray.get_actor(name), method).remote(), timeout=_CALL_S)


def resources(worker: WorkerSettings) -> dict[str, float]:
    needed: dict[str, float] = {"CPU": worker.threads or 1}
    if worker.memory_bytes is not None:
        needed["memory"] = worker.memory_bytes
    if worker.device.startswith("cuda"):
        needed["GPU"] = worker.device.count(",") + 1
    return needed

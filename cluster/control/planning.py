"""Plans of a running cluster: over whoever is there, from what was found out at its start."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from llamaclust.cluster.config.cluster_config import ClusterConfig
from llamaclust.cluster.control.plan_inputs import plan_cluster
from llamaclust.cluster.control.resource_shares import gpu_shares, machine_shares, memory_shares
from llamaclust.cluster.membership.worker_handle import WorkerHandle
from llamaclust.cluster.planner.adjacency import Pairs
from llamaclust.cluster.planner.links import Links
from llamaclust.cluster.planner.plan import Plan
from llamaclust.cluster.state.directory import Measurement
from llamaclust.core.errors import WorkerError
from llamaclust.model.loader import Model


class Planning:
    """What plans are made from. `free_bytes` is what was free for all workers together, before any held a layer, where
    they share one machine."""

    def __init__(
        self,
        config: ClusterConfig,
        model: Model,
        free_bytes: int | None,
        measured: Mapping[str, Measurement],
        links: Links,
    ) -> None:
        self._config = config
        self._model = model
        self._free_bytes = free_bytes
        self._measured = measured
        self._links = links

    @property
    def links(self) -> Links:
        return self._links

    def know(self, links: Links) -> bool:
        """From now on these are the links; whether that is news."""
        is_news, self._links = links != self._links, links
        return is_news

    async def plan(self, workers: Mapping[str, WorkerHandle], apart: Pairs = frozenset()) -> Plan:
        """Over these workers, of whom pairs that are `apart` cannot reach each other. InsufficientMemoryError where
        they have
        too little memory, WorkerError where there are none or a plan by hand names another, NetworkPartitionError. In
        a thread: over many workers and layers it takes seconds."""
        missing = [one.worker for one in self._config.plan or () if one.worker not in workers]
        if missing:
            raise WorkerError(f"the plan gives layers to {', '.join(missing)}")
        if not workers:
            raise WorkerError("no worker is left")
        gpus = gpu_shares({name: worker.registration for name, worker in workers.items()})
        known = self._memory(workers), self._measured, self._links
        return await asyncio.to_thread(plan_cluster, self._config, self._model, *known, apart, gpus)

    def _memory(self, workers: Mapping[str, WorkerHandle]) -> dict[str, int]:
        """What each may take of its machine, which others may share with it."""
        if self._free_bytes is None:
            return machine_shares({name: worker.registration for name, worker in workers.items()})
        configs = [worker for worker in self._config.workers if worker.name in workers]
        free = {name: worker.registration.free_memory_bytes for name, worker in workers.items()}
        caps = {worker.name: None if worker.memory is None else free[worker.name] for worker in configs}
        return memory_shares(caps, self._free_bytes)

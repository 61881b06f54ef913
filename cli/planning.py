"""`plan`: what a start would do, from measurements that are there."""

from __future__ import annotations

from pathlib import Path

from llamaclust.cluster.config import ClusterConfig, load_config
from llamaclust.cluster.plan import Plan
from llamaclust.cluster.plan_inputs import plan_cluster
from llamaclust.cluster.state import ClusterDir, Measurement
from llamaclust.model.loader import Model
from llamaclust.tools.catalog import resolve_model
from llamaclust.worker.devices import check_model
from llamaclust.worker.machine import available_memory_bytes


def plan_of(file: Path | None, overrides: list[str]) -> Plan:
    """The plan of a cluster file. UsageError for a wrong file, DoesNotFitError with the missing MiB."""
    config = load_config(file, overrides)
    model = Model.open(resolve_model(config.model))
    for device in {worker.device for worker in config.workers}:
        check_model(device, model)
    return plan_cluster(config, model, _memory(config), _measured(config))


def _memory(config: ClusterConfig) -> dict[str, int | None]:
    """Workers of this machine share what is free."""
    free = available_memory_bytes() // len(config.workers)
    return {worker.name: free if worker.memory is None else worker.memory for worker in config.workers}


def _measured(config: ClusterConfig) -> dict[str, Measurement]:
    """The file's own figures first, then those of the last start."""
    known = ClusterDir(config.state_dir / config.name).read_measurements()
    for worker in config.workers:
        if worker.bandwidth is not None and worker.int8 is not None:
            known[worker.name] = Measurement("the cluster file", worker.bandwidth, worker.int8)
    return known

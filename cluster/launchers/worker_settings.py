"""Makes worker settings from the cluster file and the environment of this machine."""

from __future__ import annotations

from collections import Counter
from dataclasses import fields, replace

from llamaclust.cluster.config.cluster_config import ClusterConfig
from llamaclust.cluster.config.environment import environment
from llamaclust.cluster.config.sections import WorkerConfig
from llamaclust.worker.devices.cores import read_cores
from llamaclust.worker.settings import WorkerSettings

_SETTINGS = {field.name.removesuffix("_bytes"): field.name for field in fields(WorkerSettings)}
_KEYS = {key: _SETTINGS[key] for key in WorkerConfig.model_fields if key in _SETTINGS}


def thread_shares(config: ClusterConfig) -> dict[str, int]:
    """Returns the number of threads by worker. Workers without `threads` in the cluster file share the physical cores
    of this machine, or of their NUMA node. Raises UsageError if a NUMA node does not exist."""
    cores, nodes = read_cores(), numa_nodes(config)
    sharers = Counter(nodes.values())
    found = {}
    for worker in config.workers:
        node = nodes[worker.name]
        of_node = cores if node is None or not config.launcher_facts.is_local else cores.on_node(node)
        count = len(config.workers) if of_node is cores else sharers[node]
        found[worker.name] = worker.threads or max(1, of_node.count // count)
    return found


def numa_nodes(config: ClusterConfig) -> dict[str, int | None]:
    """Returns the NUMA node of each worker. By default, local workers are spread equally over the nodes if possible."""
    workers, nodes = config.workers, read_cores().nodes
    free = all(worker.numa_node is None and worker.threads is None for worker in workers)
    if not config.launcher_facts.is_local or len(nodes) == 1 or len(workers) % len(nodes) or not free:
        return {worker.name: worker.numa_node for worker in workers}
    return {worker.name: nodes[place * len(nodes) // len(workers)] for place, worker in enumerate(workers)}


def worker_settings(config: ClusterConfig) -> list[WorkerSettings]:
    threads, nodes, variables = thread_shares(config), numa_nodes(config), environment()
    common = {
        "feature_level": variables.feature_level or "",
        "log_format": variables.log_format,
        "cluster": config.name,
    }
    keys = [{name: getattr(worker, key) for key, name in _KEYS.items()} for worker in config.workers]
    shares = ({"threads": threads[own["name"]], "numa_node": nodes[own["name"]]} for own in keys)
    return [with_caches(WorkerSettings(**own | share | common)) for own, share in zip(keys, shares, strict=True)]


def with_caches(settings: WorkerSettings) -> WorkerSettings:
    variables = environment()
    return replace(
        settings,
        packed_cache_dir=variables.packed_cache_dir if variables.packed_cache_bytes else None,
        packed_cache_bytes=variables.packed_cache_bytes,
        weights_dir=variables.weights_dir if variables.weights_bytes else None,
        weights_bytes=variables.weights_bytes,
        kernels_dir=variables.kernels_dir,
        models_dir=variables.models_dir,
        kv_disk_dir=variables.kv_disk_dir,
    )

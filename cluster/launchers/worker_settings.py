"""From the cluster file and this machine's environment to the settings of workers."""

from __future__ import annotations

from dataclasses import fields, replace

from llamaclust.cluster.config.cluster_config import ClusterConfig
from llamaclust.cluster.config.environment import environment
from llamaclust.cluster.config.sections import WorkerConfig
from llamaclust.worker.devices.cores import physical_cores
from llamaclust.worker.settings import WorkerSettings

_SETTINGS = {field.name.removesuffix("_bytes"): field.name for field in fields(WorkerSettings)}
_KEYS = {key: _SETTINGS[key] for key in WorkerConfig.model_fields if key in _SETTINGS}
"""Keys of the cluster file that are settings of the same name; sizes are in bytes."""


def thread_shares(config: ClusterConfig) -> dict[str, int]:
    """Threads of each worker: workers without a number of their own share this machine's physical cores."""
    share = max(1, physical_cores() // len(config.workers))
    return {worker.name: worker.threads or share for worker in config.workers}


def worker_settings(config: ClusterConfig) -> list[WorkerSettings]:
    """Of all workers, if they run on this machine."""
    threads, variables = thread_shares(config), environment()
    common = {
        "feature_level": variables.feature_level or "",
        "log_format": variables.log_format,
        "cluster": config.name,
    }
    keys = [{name: getattr(worker, key) for key, name in _KEYS.items()} for worker in config.workers]
    return [with_caches(WorkerSettings(**own | {"threads": threads[own["name"]]} | common)) for own in keys]


def with_caches(settings: WorkerSettings) -> WorkerSettings:
    """The same worker with the caches of this machine."""
    variables = environment()
    return replace(
        settings,
        packed_cache_dir=variables.packed_cache_dir if variables.packed_cache_bytes else None,
        packed_cache_bytes=variables.packed_cache_bytes,
        weights_dir=variables.weights_dir if variables.weights_bytes else None,
        weights_bytes=variables.weights_bytes,
        kernels_dir=variables.kernels_dir,
        kv_disk_dir=variables.kv_disk_dir,
    )

"""`plan`: what a start would do, from measurements that are there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import closing
from functools import cache
from pathlib import Path

from llamaclust.cluster.api.settings import read_api_keys
from llamaclust.cluster.config.cluster_config import ClusterConfig, load_config
from llamaclust.cluster.control.link_profiling import hops_matter, kept_links
from llamaclust.cluster.control.planning import ClusterResources, plan_cluster
from llamaclust.cluster.control.profiling import stated_speeds
from llamaclust.cluster.control.resource_shares import (
    WorkerResources,
    measurement_key,
)
from llamaclust.cluster.launchers.worker_settings import worker_settings
from llamaclust.cluster.planner.format import plan_json, plan_lines
from llamaclust.cluster.planner.links import Links
from llamaclust.cluster.planner.plan import Plan
from llamaclust.cluster.state.directory import read_profiles
from llamaclust.core.errors import InsufficientMemoryError, UsageError
from llamaclust.core.gpus import Gpu
from llamaclust.core.profile import Profile
from llamaclust.core.sizes import mib
from llamaclust.model.loader import Model
from llamaclust.tools.hub.catalog import resolve_model
from llamaclust.worker.devices.devices import check_devices, fingerprint, gpus_of
from llamaclust.worker.devices.system_info import available_memory_bytes, resident_bytes
from llamaclust.worker.settings import WorkerSettings


def show_plan(file: Path | None, overrides: list[str], as_json: bool) -> None:
    """Prints the plan of a cluster file; raises what `plan_of` does."""
    config = load_config(file, overrides)
    plan, own_bytes = _planned(config)
    print(json.dumps(plan_json(plan)) if as_json else "\n".join((*plan_lines(plan), *_room(config, own_bytes))))


def plan_of(file: Path | None, overrides: list[str]) -> Plan:
    """The plan of a cluster file. UsageError for a wrong file, InsufficientMemoryError with the missing MiB."""
    return _planned(load_config(file, overrides))[0]


def _planned(config: ClusterConfig) -> tuple[Plan, int]:
    """The plan, and the bytes that a worker's process takes by itself: it is taken to be as large as this one, which
    has loaded the kernels too and holds nothing of the model yet. API keys and chat template are checked as by `up`."""
    if not _is_of_this_machine(config):
        why = "what its machines have is known once their workers have joined"
        raise UsageError(f"launcher {config.launcher}: {why}; `llamaclust up` prints the plan then")
    read_api_keys(config.api_keys_file)
    own_bytes = resident_bytes()
    with closing(Model.open(resolve_model(config.model), config.chat_template)) as model:
        measured = _measured(config, model.model_id)
        check_devices(((spec.device, spec.feature_level) for spec in worker_settings(config)), model)
        resources = ClusterResources(
            _workers(config, own_bytes), measured, _links(config, measured), free_bytes=available_memory_bytes()
        )
        try:
            return plan_cluster(config, model, resources), own_bytes
        except InsufficientMemoryError as error:
            raise InsufficientMemoryError("; ".join((str(error), *map(str.strip, _room(config, own_bytes))))) from error


def _is_of_this_machine(config: ClusterConfig) -> bool:
    """Whether all workers are sure to start here."""
    return config.launcher == "local" or (config.launcher == "ray" and config.ray.address == "none")


def _workers(config: ClusterConfig, own_bytes: int) -> dict[str, WorkerResources]:
    """As they would register. Without a cap a worker may take all that is free."""
    memory = {worker.name: max(0, (worker.memory or 0) - own_bytes) for worker in config.workers}
    return {
        spec.name: WorkerResources(
            "", memory[spec.name], gpus=() if spec.device == "cpu" else _gpus_here(spec), gpu_layers=spec.gpu_layers
        )
        for spec in worker_settings(config)
    }


def _room(config: ClusterConfig, own_bytes: int) -> tuple[str, ...]:
    """Why workers with `memory` have less than that, as lines; none where no worker has it."""
    if all(worker.memory is None for worker in config.workers):
        return ()
    return (f"  `memory` is for all of a worker: its process itself takes about {mib(own_bytes)} MiB of it",)


def _links(config: ClusterConfig, measured: Mapping[str, Profile]) -> Links:
    """Of a start on this machine."""
    return kept_links(_fingerprints(config), config.state_dir) if hops_matter(measured) else Links()


@cache
def _gpus_here(spec: WorkerSettings) -> tuple[Gpu, ...]:
    return gpus_of(spec.device, spec.gpu_memory_bytes)


def _fingerprints(config: ClusterConfig) -> dict[str, str]:
    specs = worker_settings(config)
    return {
        spec.name: fingerprint(spec.device, spec.threads or 0, spec.feature_level, _gpus_here(spec)) for spec in specs
    }


def _measured(config: ClusterConfig, model_id: str) -> dict[str, Profile]:
    """The file's own figures first, then those of a start with the same workers on the same hardware: with this model,
    or else with another."""
    specs, known = worker_settings(config), read_profiles(config.state_dir)
    threads = sum(spec.threads or 0 for spec in specs)
    prints = _fingerprints(config)
    found: dict[str, Profile] = {}
    for profiled in ("", model_id):
        keys = {name: measurement_key(text, len(specs), threads, profiled) for name, text in prints.items()}
        found |= {name: known[key] for name, key in keys.items() if key in known}
    return found | stated_speeds(config)

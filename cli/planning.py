"""`plan`: what a start would do, from measurements that are there."""

from __future__ import annotations

from pathlib import Path

from llamaclust.cluster.config import ClusterConfig, load_config
from llamaclust.cluster.measuring import stated_speeds
from llamaclust.cluster.plan import Plan
from llamaclust.cluster.plan_inputs import plan_cluster
from llamaclust.cluster.shares import measurement_key, memory_shares, worker_specs
from llamaclust.cluster.state import Measurement, read_measurements
from llamaclust.model.loader import Model
from llamaclust.tools.catalog import resolve_model
from llamaclust.worker.devices import check_devices, fingerprint
from llamaclust.worker.machine import available_memory_bytes, resident_bytes


def plan_of(file: Path | None, overrides: list[str]) -> Plan:
    """The plan of a cluster file. UsageError for a wrong file, DoesNotFitError with the missing MiB."""
    config = load_config(file, overrides)
    model = Model.open(resolve_model(config.model))
    check_devices(((spec.device, spec.feature_level) for spec in worker_specs(config)), model)
    return plan_cluster(config, model, _memory(config), _measured(config))


def _memory(config: ClusterConfig) -> dict[str, int]:
    """As a start would share it out; a worker that holds nothing yet is taken to be as large as this process."""
    own = resident_bytes()
    caps = {one.name: None if one.memory is None else max(0, one.memory - own) for one in config.workers}
    return memory_shares(caps, available_memory_bytes())


def _measured(config: ClusterConfig) -> dict[str, Measurement]:
    """The file's own figures first, then those of a start with the same workers on the same hardware."""
    specs, known = worker_specs(config), read_measurements(config.state_dir)
    threads = sum(spec.threads or 0 for spec in specs)
    prints = {spec.name: fingerprint(spec.device, spec.threads or 0, spec.feature_level) for spec in specs}
    keys = {name: measurement_key(one, len(specs), threads) for name, one in prints.items()}
    return {name: known[key] for name, key in keys.items() if key in known} | stated_speeds(config)

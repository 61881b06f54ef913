"""Plans models on described machines. Overrides are keys of a cluster file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

from llamaclust.cluster.config.cluster_config import ClusterConfig, load_config
from llamaclust.cluster.control.planning import ClusterResources, plan_cluster
from llamaclust.cluster.control.resources.resource_shares import WorkerResources
from llamaclust.cluster.planner.plan import Plan, Prediction
from llamaclust.core.errors import InsufficientMemoryError, ModelFileError, UsageError
from llamaclust.core.gpus import Gpu
from llamaclust.core.limits import MAX_EXPERT_SHARDS
from llamaclust.core.profile import Profile
from llamaclust.tools.assume import rates
from llamaclust.tools.assume.assumed_model import AssumedModel
from llamaclust.tools.assume.machines import AssumedMachines, Machine

KEYS = (
    "context_length",
    "groups",
    "kv_memory",
    "kv_type",
    "max_sequences",
    "mmproj",
    "objective",
    "plan",
    "prefill_chunk",
)
_LOADED = 0.95
"""Minimum share of a model file that must fit in memory. The rest may be MTP layers, which are not loaded."""


@dataclass(frozen=True, slots=True)
class AssumedCluster:
    assumed: AssumedMachines
    overrides: tuple[str, ...] = ()

    @classmethod
    def of(cls, assumed: AssumedMachines, overrides: Sequence[str]) -> AssumedCluster:
        """Returns a cluster of these machines. Raises UsageError for an override whose key is not in `KEYS`."""
        for text in overrides:
            if _section(text) not in KEYS:
                key = text.partition("=")[0].strip()[:100]
                raise UsageError(
                    f"--set {key}: a plan for assumed machines does not use this key; it uses {', '.join(KEYS)}"
                )
        return cls(assumed, tuple(overrides))

    def changed(self, assumed: AssumedMachines) -> AssumedCluster:
        return replace(self, assumed=assumed)

    def with_machines(self, count: int) -> AssumedCluster:
        machines = self.assumed.machines
        return self.changed(replace(self.assumed, machines=(*machines, *((machines[-1],) * count))))

    def with_one(self, machine: Machine) -> AssumedCluster:
        """Returns a cluster of this machine only. Drops the override `plan`, which may name other machines."""
        overrides = tuple(text for text in self.overrides if _section(text) != "plan")
        return AssumedCluster(replace(self.assumed, machines=(machine,)), overrides)

    def plan(self, model: AssumedModel, *, max_expert_shards: int = MAX_EXPERT_SHARDS) -> Plan:
        """Plans a model. Raises UsageError for a bad override, or if a GPU cannot run the model. Raises
        InsufficientMemoryError if the model does not fit."""
        workers = {f"m{number}": machine for number, machine in enumerate(self.assumed.machines, 1)}
        resources = ClusterResources(
            workers={name: _resources(name, machine) for name, machine in workers.items()},
            profiles={name: _profile(machine) for name, machine in workers.items()},
            links=rates.links_of(self.assumed.network, list(workers)),
        )
        try:
            config = self._config(list(workers))
            opened = model.with_projector(config.mmproj)
            return plan_cluster(config, opened, resources, max_expert_shards=max_expert_shards)
        except ModelFileError as error:
            if not any(machine.gpus for machine in self.assumed.machines):
                raise
            raise UsageError(f"--assume: {model.title}: {error}; remove the GPUs from MACHINES") from error

    @property
    def memory_bytes(self) -> int:
        machines = self.assumed.machines
        gpus = [gpu.memory_bytes - rates.GPU_RESERVED_BYTES for machine in machines for gpu in machine.gpus]
        return sum(max(0, n_bytes) for n_bytes in (*gpus, *map(room_bytes, machines)))

    def fitting_plan(self, model: AssumedModel, *, max_expert_shards: int = 1) -> Plan | None:
        """Returns a plan, or None if the model does not fit. By default, all experts of a layer stay on one machine."""
        if _LOADED * model.file.size_bytes > self.memory_bytes:
            return None
        try:
            return self.plan(model, max_expert_shards=max_expert_shards)
        except InsufficientMemoryError:
            return None

    def _config(self, names: Sequence[str]) -> ClusterConfig:
        workers = json.dumps([{"name": name} for name in names])
        return load_config(None, ["name=assumed", "objective=latency", f"workers={workers}", *self.overrides])


def _section(override: str) -> str:
    return override.partition("=")[0].strip().split(".")[0]


def prediction_of(plan: Plan) -> Prediction:
    assert plan.prediction is not None  # There is a prediction, because all devices have profiles.
    return plan.prediction


def room_bytes(machine: Machine) -> int:
    return max(0, machine.cpu.memory_bytes - rates.SYSTEM_BYTES)


def _resources(name: str, machine: Machine) -> WorkerResources:
    gpus = (
        Gpu(
            f"cuda:{number}",
            gpu.gpu_name or "assumed",
            gpu.memory_bytes,
            max(0, gpu.memory_bytes - rates.GPU_RESERVED_BYTES),
        )
        for number, gpu in enumerate(machine.gpus)
    )
    return WorkerResources(
        name, room_bytes(machine), gpus=tuple(gpus), threads=rates.threads_of(machine.cpu), accepts_links=True
    )


def _profile(machine: Machine) -> Profile:
    return Profile(rates.cpu_profile(machine.cpu), tuple(map(rates.gpu_profile, machine.gpus)))

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil, floor

from llamaclust.cluster.config.cluster_config import ClusterConfig
from llamaclust.cluster.planner.plan import Plan
from llamaclust.core.errors import UsageError
from llamaclust.core.gpus import Placement, gpu_names
from llamaclust.model.loader import Model
from llamaclust.model.placement import PlacementRule, placement_of, rule_effects


def placements(config: ClusterConfig, model: Model, gpus: Mapping[str, Sequence[str]]) -> dict[str, Placement]:
    """Returns where each worker puts tensors, given the names of its GPUs. Raises UsageError, with `worker` set, if a
    worker cannot obey a rule."""
    known: dict[tuple[tuple[PlacementRule, ...], int | None], Placement] = {}
    found = {}
    for worker in gpus:
        key = _rules(config, worker), _cpu_moe(config, worker)
        if key not in known:
            known[key] = placement_of(model, *key)
        found[worker] = known[key]
        stages = [entry.layers for entry in config.plan if worker in entry.names] if config.plan else None
        for start, end in [(0, model.layer_count)] if stages is None else stages:
            _check_stage(known[key], worker, gpus, floor(start), ceil(end))
    return found


def _check_stage(placement: Placement, worker: str, gpus: Mapping[str, Sequence[str]], start: int, end: int) -> None:
    try:
        placement.check(gpus[worker], start, end)
    except UsageError as error:
        own = placement.missing(gpus[worker], start, end)
        others = [name for name, devices in gpus.items() if own in devices]
        where = f", or limit the rule to workers that have it: workers: [{', '.join(others)}]" if others else ""
        raise UsageError(f"{error}{where} (worker {worker})", worker=worker) from error


def check_obeyed(plan: Plan, wanted: Mapping[str, Placement]) -> None:
    """Raises UsageError, with `worker` set, if a stage has a layer on a device that its worker's rules do not allow."""
    for stage in plan.stages:
        try:
            wanted[stage.worker].check_obeyed(stage.device_layers)
        except UsageError as error:
            raise UsageError(f"{error} (worker {stage.worker})", worker=stage.worker) from error


def check_placement(config: ClusterConfig, model: Model) -> None:
    """Raises UsageError if there is a placement rule that no worker can obey."""
    own = {worker.name for worker in config.workers if worker.cpu_moe is not None}
    if (config.cpu_moe is not None or own) and not model.hyperparameters.expert_count:
        raise UsageError(f"cpu_moe: {model.file.path} has no experts; remove cpu_moe")
    if config.experts_cache and not model.hyperparameters.expert_count:
        raise UsageError(f"experts_cache: {model.file.path} has no experts; remove experts_cache")
    rule_effects(model, [entry.rule for entry in config.placement])
    gpus = {worker.name: gpu_names(worker.device) for worker in config.workers}
    if not config.launcher_facts.starts_workers:
        placements(config, model, dict.fromkeys(gpus, ()))
        return
    if config.cpu_moe is not None and not any(gpus.values()):
        what = f"none of {len(gpus)} workers has a GPU, so all experts are in RAM anyway"
        raise UsageError(f"cpu_moe: {what}; remove cpu_moe")
    if config.experts_cache and not any(gpus.values()):
        raise UsageError(f"experts_cache: none of {len(gpus)} workers has a GPU; remove experts_cache")
    for entry in config.placement:
        if not any(gpus[worker] for worker in gpus if entry.is_for(worker)):
            what = f"{entry.rule} applies to no worker with a GPU, and workers without GPUs have all weights in RAM"
            raise UsageError(f"placement: {what}; remove this rule")
    placements(config, model, gpus)


def _rules(config: ClusterConfig, worker: str) -> tuple[PlacementRule, ...]:
    return tuple(entry.rule for entry in config.placement if entry.is_for(worker))


def _cpu_moe(config: ClusterConfig, worker: str) -> int | None:
    own = next((each for each in config.workers if each.name == worker and "cpu_moe" in each.model_fields_set), config)
    return own.cpu_moe

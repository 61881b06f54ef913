"""The `plan` command: shows the plan with which a cluster would start, predicted from stored measurements."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from llamaclust.cluster.config.catalog import resolve_model
from llamaclust.cluster.config.cluster_config import ClusterConfig, load_config
from llamaclust.cluster.control.limits import check_distinct, unused_mtp
from llamaclust.cluster.control.planning import (
    ClusterResources,
    MakeClusterPlan,
    plan_cluster,
    plan_with_optional_encoder,
)
from llamaclust.cluster.control.resources.link_profiling import kept_links, needs_links
from llamaclust.cluster.control.resources.placement import check_placement
from llamaclust.cluster.control.resources.profiling import stated_speeds
from llamaclust.cluster.control.resources.resource_shares import WorkerResources, measurement_key
from llamaclust.cluster.launchers.models.projectors import open_with_projector
from llamaclust.cluster.launchers.models.row_memory import row_bytes, row_limits
from llamaclust.cluster.launchers.worker_settings import numa_nodes, thread_shares, worker_settings
from llamaclust.cluster.planner.format import plan_json, plan_lines
from llamaclust.cluster.planner.links import Links
from llamaclust.cluster.planner.plan import Plan
from llamaclust.cluster.planner.speculation import USUAL_ACCEPTANCES
from llamaclust.cluster.server.drafting import DraftModelMemory, draft_model_memory
from llamaclust.cluster.state.api_keys import read_api_keys
from llamaclust.cluster.state.measurements import OtherLoad, disturbance, read_other_loads, read_profiles
from llamaclust.core.errors import InsufficientMemoryError, UsageError
from llamaclust.core.sizes import mib
from llamaclust.model.loader import Model
from llamaclust.model.placement import RuleEffect, rule_effects
from llamaclust.worker.devices.cores import read_cores
from llamaclust.worker.devices.devices import check_devices, fingerprint, gpus_of
from llamaclust.worker.devices.system_info import LOADING_BYTES, available_memory_bytes, resident_bytes


def show_plan(
    file: Path | None, overrides: list[str], as_json: bool, acceptances: Sequence[float] | None = None
) -> None:
    """Prints a cluster's plan, and the gain from drafts for each acceptance rate in `acceptances`.
    Raises UsageError if `acceptances` are given while speculation is off, and the errors of `planned`."""
    config = load_config(file, overrides)
    models = config.of_each_model()
    if acceptances is not None and any(own.speculative is None for own in models):
        raise UsageError("--acceptance has no effect: the cluster drafts nothing, because `speculative` is off")
    acceptances = USUAL_ACCEPTANCES if acceptances is None else acceptances
    if config.models:
        check_distinct((own.model_name, _model_id(own)) for own in models)
    if as_json:
        shown = [{"name": own.model_name} | _json(own, acceptances) for own in models] if config.models else []
        print(json.dumps({"models": shown} if config.models else _json(models[0], acceptances)))
        return
    for own in models:
        if config.models:
            print(f"{own.model_name}, alone:")
        _show(own, acceptances)


@dataclass(frozen=True, slots=True)
class PlannedStart:
    """The plan with which a cluster would start on this machine, and further values that `plan` prints."""

    plan: Plan
    row_bytes: int  # Maximum memory, in bytes, that the coordinator uses for encoded images.
    own_bytes: int
    """Bytes of memory of a worker process without a model, estimated from the memory of this process."""
    draft_model: DraftModelMemory | None
    unused: tuple[str, ...]
    """Hints about an MTP head that could draft tokens but is not used, and about projectors that are not used."""
    other_loads: Mapping[str, OtherLoad]
    """Maps a worker's name to the load that other programs caused while the worker was measured."""


def _json(config: ClusterConfig, acceptances: Sequence[float]) -> dict[str, object]:
    rules = [
        {"tensors": each.rule.pattern, "device": each.rule.device, "count": each.tensors, "bytes": each.n_bytes}
        for each in _effects(config)
    ]
    start = planned(config)
    drafting = None if start.draft_model is None else asdict(start.draft_model)
    loads = {name: asdict(load) for name, load in start.other_loads.items()}
    beside = {"kv_disk_bytes": _on_disk(config), "placement": rules, "draft_model": drafting, "other_loads": loads}
    return plan_json(start.plan, acceptances) | beside


def _effects(config: ClusterConfig) -> Sequence[RuleEffect]:
    if not config.placement:
        return ()
    with _opened(config) as (model, _):
        return rule_effects(model, [entry.rule for entry in config.placement])


def _on_disk(config: ClusterConfig) -> dict[str, int]:
    return {worker.name: worker.kv_disk for worker in config.workers if worker.kv_disk is not None}


def _show(config: ClusterConfig, acceptances: Sequence[float]) -> None:
    start, on_disk = planned(config), _on_disk(config)
    kv_disk = ", ".join(f"{stage.worker} {mib(on_disk[stage.worker])} MiB" for stage in start.plan.stages if on_disk)
    lines = (f"  KV memory on disk, at most: {kv_disk}",) if kv_disk else ()
    rules = (
        f"  placement: {each.rule} decides on {each.tensors} tensors with {mib(each.n_bytes)} MiB"
        for each in _effects(config)
    )
    beside = _beside(config, start.own_bytes, start.draft_model)
    found = (_image_rows(start), *start.unused, disturbance(start.other_loads.values()))
    hints = tuple(f"  {hint}" for hint in found if hint is not None)
    print("\n".join((*plan_lines(start.plan, acceptances), *rules, *lines, _cores(config), *beside, *hints)))


def _image_rows(start: PlannedStart) -> str | None:
    if not start.row_bytes:
        return None
    return f"the coordinator takes up to {mib(start.row_bytes)} MiB of this machine for rows of images"


def _cores(config: ClusterConfig) -> str:
    threads, cores, nodes = thread_shares(config), read_cores(), numa_nodes(config)
    on_node = {name: "" if node is None else f" on NUMA node {node}" for name, node in nodes.items()}
    text = f"  threads: {', '.join(f'{name} {count}{on_node[name]}' for name, count in threads.items())}, for {cores}"
    if sum(threads.values()) > cores.count:
        text += "; more threads than cores are slower"
    if len(cores.nodes) > 1 and not any(on_node.values()):
        text += f"; {len(cores.nodes)} NUMA nodes: one worker on each node, without `threads`, is faster"
    return text


def planned(config: ClusterConfig) -> PlannedStart:
    """Plans a cluster's start. Raises UsageError if the cluster file, API keys or chat template are invalid, and
    InsufficientMemoryError with the missing MiB if the model does not fit."""
    facts = config.launcher_facts
    if not (facts.is_local or (facts.uses_ray and config.ray.address == "none")):
        why = "its machines' resources are known only after their workers have joined"
        raise UsageError(f"launcher {config.launcher}: {why}; start the cluster, which then prints the plan")
    read_api_keys(config.api_keys_file)
    own_bytes, specs = resident_bytes() + LOADING_BYTES, worker_settings(config)
    with _opened(config) as (model, unused_projectors):
        check_placement(config, model)
        gpus = {spec.name: gpus_of(spec.device, spec.gpu_memory_bytes) for spec in specs}
        fingerprints = {
            spec.name: fingerprint(spec.device, spec.threads or 0, spec.feature_level, gpus[spec.name], spec.numa_node)
            for spec in specs
        }
        keys = _measurement_keys(model.model_id, fingerprints, sum(spec.threads or 0 for spec in specs))
        known, loads = read_profiles(config.state_dir), read_other_loads(config.state_dir)
        stated = stated_speeds(config)
        used = {name: key for name, of in keys.items() if (key := next(filter(known.__contains__, of), None))}
        profiles = {name: known[key] for name, key in used.items()} | stated
        check_devices(((spec.device, spec.feature_level) for spec in specs), model)
        links = kept_links(fingerprints, config.state_dir) if needs_links(profiles) else Links()
        # Settings with which workers would register. Without a limit, a worker may take all free memory.
        workers = {
            spec.name: WorkerResources(
                "",
                max(0, (spec.memory_bytes or 0) - own_bytes),
                gpus=gpus[spec.name],
                gpu_layers=spec.gpu_layers,
                threads=spec.threads or 1,
                accepts_links=True,
            )
            for spec in specs
        }
        draft_model = _draft_model(config)
        taken_bytes = 0 if draft_model is None else draft_model.bytes
        limits = row_limits(taken_bytes)
        of_rows = row_bytes(limits, [model])
        free_bytes = max(0, available_memory_bytes() - taken_bytes - of_rows)
        try:
            resources = ClusterResources(workers, profiles, links, free_bytes=free_bytes, row_bytes=of_rows)
            make: MakeClusterPlan = plan_with_optional_encoder if config.mmproj is None else plan_cluster
            plan = make(config, model, resources)
        except InsufficientMemoryError as error:
            beside = map(str.strip, _beside(config, own_bytes, draft_model))
            raise InsufficientMemoryError("; ".join((str(error), *beside))) from error
        other_loads = {name: loads[key] for name, key in used.items() if key in loads and name not in stated}
        unused = filter(None, (unused_mtp(config, model), unused_projectors))
        return PlannedStart(plan, 0 if plan.no_images else of_rows, own_bytes, draft_model, tuple(unused), other_loads)


@contextmanager
def _opened(config: ClusterConfig) -> Iterator[tuple[Model, str | None]]:
    adapters = [adapter.path for adapter in config.adapters]
    path = resolve_model(config.model)
    model, unused = open_with_projector(path, config.mmproj, config.chat_template, adapters)
    with model:
        yield model, unused


def _model_id(config: ClusterConfig) -> str:
    with _opened(config) as (model, _):
        return model.model_id


def _draft_model(config: ClusterConfig) -> DraftModelMemory | None:
    if config.speculative is None or config.speculative.model is None:
        return None
    with ExitStack() as opened:
        models = [(own, opened.enter_context(_opened(own))[0]) for own in config.of_each_model()]
        return draft_model_memory(models)


def _beside(config: ClusterConfig, own_bytes: int, draft_model: DraftModelMemory | None) -> Iterator[str]:
    if draft_model is not None:
        yield f"  {draft_model.text}, which workers do not have"
        yield from (f"  {remark}" for remark in draft_model.remarks)
    if any(worker.memory is not None for worker in config.workers):
        yield f"  `memory` limits a whole worker: its process without layers takes about {mib(own_bytes)} MiB of that"


def _measurement_keys(model_id: str, fingerprints: Mapping[str, str], threads: int) -> dict[str, list[str]]:
    return {
        name: [measurement_key(text, len(fingerprints), threads, profiled) for profiled in (model_id, "")]
        for name, text in fingerprints.items()
    }

"""From a cluster file, a model and what is known of workers to a plan, and from that to what stages load with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

from llamaclust.cluster.config.cluster_config import ClusterConfig
from llamaclust.cluster.control.resource_shares import WorkerGpus, thread_shares
from llamaclust.cluster.control.stage_memory import rounding_of, workspace_of
from llamaclust.cluster.planner.adjacency import Pairs
from llamaclust.cluster.planner.costs import GpuFacts, WorkerFacts
from llamaclust.cluster.planner.links import UNKNOWN, Links
from llamaclust.cluster.planner.manual import Assignment, checked
from llamaclust.cluster.planner.plan import Plan
from llamaclust.cluster.planner.planner import PlanRequest, make_plan
from llamaclust.cluster.scheduler.settings import SchedulerSettings
from llamaclust.cluster.state.directory import GpuMeasurement, Measurement
from llamaclust.core.errors import InsufficientMemoryError, UsageError
from llamaclust.core.gpus import Gpu
from llamaclust.core.limits import StageLimits
from llamaclust.model.loader import Model, ModelCosts
from llamaclust.wire.microbatch.codec import MAX_MICROBATCH_BYTES, MAX_STAGES
from llamaclust.wire.microbatch.frames import MAX_FRAME_BYTES

_ROWS = 512
_OUTPUTS = 64


def context_length(config: ClusterConfig, model: Model) -> int:
    """Tokens per sequence: what the file asks for, or what the model was made for where the file does not say.

    UsageError for more than the model was made for.
    """
    trained = model.hyperparameters.context_length
    if "context_length" in config.model_fields_set and config.context_length > trained:
        asked = f"context_length: {config.context_length}"
        raise UsageError(f"{asked}: the model was made for {trained} tokens; set {trained} or less")
    return min(config.context_length, trained)


def check_plan(config: ClusterConfig, model: Model) -> None:
    """UsageError for what is wrong whatever the workers turn out to be: the context, frames, a plan by hand."""
    context_length(config, model)
    _check_frames(config, model)
    if config.plan is not None:
        names = [one.worker for one in config.plan] if config.awaits_any else [one.name for one in config.workers]
        checked(_by_hand(config), names, model.layer_count)


def _check_frames(config: ClusterConfig, model: Model) -> None:
    """Between stages, a microbatch and its hidden state are one message."""
    width = model.hyperparameters.embedding_length
    room = (MAX_FRAME_BYTES - MAX_MICROBATCH_BYTES) // (4 * width)
    if len(config.workers) > 1 and max_rows(config) > room:
        asked = f"prefill_chunk and max_sequences make microbatches of {max_rows(config)} tokens"
        raise UsageError(f"{asked}: {room} tokens of {4 * width} bytes fit in a message between workers; lower them")


def _by_hand(config: ClusterConfig) -> tuple[Assignment, ...]:
    return tuple((one.worker, *one.layers) for one in config.plan or ())


def max_rows(config: ClusterConfig) -> int:
    """Rows of a microbatch, at most: a prefill chunk beside all that decode."""
    return max(_ROWS, config.prefill_chunk or 0) + config.max_sequences


def max_outputs(config: ClusterConfig) -> int:
    return max(_OUTPUTS, config.max_sequences)


def plan_cluster(
    config: ClusterConfig,
    model: Model,
    memory_bytes: Mapping[str, int],
    measured: Mapping[str, Measurement],
    links: Links = UNKNOWN,
    apart: Pairs = frozenset(),
    gpus: Mapping[str, WorkerGpus] = MappingProxyType({}),
) -> Plan:
    """The plan of those of `config`'s workers that have memory: `memory_bytes` is what each may take, `cards` the GPUs
    of those that have some. Pairs that are `apart` cannot reach each other.

    Raises InsufficientMemoryError with the missing MiB, UsageError for a plan by hand that is wrong,
    NetworkPartitionError."""
    length = context_length(config, model)
    ask = PlanRequest(
        context_length=length,
        max_sequences=config.max_sequences,
        workspace=workspace_of(model, _limits(config, length, kv_blocks=1)),
        objective=config.objective,
        manual=None if config.plan is None else _by_hand(config),
        kv_memory_bytes=config.kv_memory,
        links=links,
        apart=apart,
        max_rows=max_rows(config),
        rounding=rounding_of(model),
    )
    threads = thread_shares(config)
    names = [name for name in threads if name in memory_bytes]
    reaches = links.reaches(names)
    facts = []
    for name in names:
        one = _facts(name, memory_bytes[name], measured.get(name), threads[name])
        facts.append(replace(_with_gpus(one, gpus.get(name), measured.get(name)), reach=reaches[name]))
    plan = _made(model.costs(config.kv_type), facts, ask)
    if len(plan.stages) > MAX_STAGES:
        raise UsageError(f"the plan has {len(plan.stages)} stages, {MAX_STAGES} are possible: use fewer workers")
    return plan


def _made(costs: ModelCosts, facts: Sequence[WorkerFacts], ask: PlanRequest) -> Plan:
    """The plan. InsufficientMemoryError that says so where only the wanted layers on GPUs are too many."""
    try:
        return make_plan(costs, facts, ask)
    except InsufficientMemoryError as error:
        if all(one.gpu_layers is None for one in facts):
            raise
        try:
            fitting = make_plan(costs, [replace(one, gpu_layers=None) for one in facts], ask)
        except InsufficientMemoryError:
            raise error from None
        on_gpus = sum(one.end - one.start for stage in fitting.stages for one in stage.devices if one.device != "cpu")
        raise InsufficientMemoryError(
            f"{error}; or set gpu_layers to auto, which fits: {on_gpus} layers are on GPUs then"
        ) from error


def _facts(name: str, memory_bytes: int, measured: Measurement | None, threads: int) -> WorkerFacts:
    if measured is None:
        return WorkerFacts(name, memory_bytes, None, None, threads)
    facts = WorkerFacts(name, memory_bytes, measured.read_gb_s, measured.int8_gmac_s, threads)
    return replace(facts, alone=measured.alone, together=measured.together)


def _with_gpus(facts: WorkerFacts, gpus: WorkerGpus | None, measured: Measurement | None) -> WorkerFacts:
    if gpus is None:
        return facts
    measured_gpus = () if measured is None else measured.gpus
    speeds = measured_gpus if len(measured_gpus) == len(gpus.gpus) else (None,) * len(gpus.gpus)
    known = tuple(map(_gpu_facts, gpus.gpus, speeds))
    return replace(facts, gpus=known, gpu_layers=gpus.gpu_layers)


def _gpu_facts(gpu: Gpu, measured: GpuMeasurement | None) -> GpuFacts:
    if measured is None:
        return GpuFacts(gpu.device, gpu.free_bytes)
    return GpuFacts(gpu.device, gpu.free_bytes, measured.read_gb_s, measured.int8_gmac_s, measured.trial)


def stage_limits(config: ClusterConfig, plan: Plan) -> StageLimits:
    """What every stage of the plan is loaded with."""
    return _limits(config, plan.context_length, plan.kv_blocks, plan.window_blocks)


def _limits(config: ClusterConfig, context_length: int, kv_blocks: int, window_blocks: int = 0) -> StageLimits:
    return StageLimits(
        max_tokens=max_rows(config),
        max_outputs=max_outputs(config),
        max_sequences=config.max_sequences,
        max_context_tokens=context_length,
        kv_blocks=kv_blocks,
        kv_type=config.kv_type.value,
        window_blocks=window_blocks,
    )


def scheduler_settings(config: ClusterConfig, model: Model, plan: Plan) -> SchedulerSettings:
    """What the scheduler keeps to: the limits that the stages were loaded with."""
    return SchedulerSettings(
        model_id=model.model_id,
        vocabulary=model.hyperparameters.vocabulary_size,
        context_length=plan.context_length,
        kv_blocks=plan.kv_blocks,
        kv_type=config.kv_type,
        max_sequences=config.max_sequences,
        max_waiting=config.max_waiting,
        max_rows=max_rows(config),
        max_outputs=max_outputs(config),
        prefill_chunk=config.prefill_chunk,
        prefix_cache=config.prefix_cache,
        window=model.window if plan.window_blocks else None,
        window_blocks=plan.window_blocks,
    )

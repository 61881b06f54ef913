"""Computes the limits of the scheduler and of each stage from the cluster file, the model and the plan."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction

from llamaclust.cluster.config.cluster_config import ClusterConfig
from llamaclust.cluster.control.resources.groups import check_groups
from llamaclust.cluster.control.resources.placement import check_placement
from llamaclust.cluster.planner.context import ContextBound, ContextBounds
from llamaclust.cluster.planner.manual import Assignment, checked
from llamaclust.cluster.planner.plan import Plan
from llamaclust.cluster.scheduler.capacity import BlockCounts, Capacity, longest_context, microbatch_rows
from llamaclust.cluster.scheduler.drafting.ngram import NgramDrafters
from llamaclust.cluster.scheduler.drafting.shared import SharedDrafters
from llamaclust.cluster.scheduler.kv.groups import WindowGroup, window_group
from llamaclust.cluster.scheduler.settings import SchedulerSettings
from llamaclust.cluster.scheduler.speculation.draft_model import DraftModel
from llamaclust.cluster.scheduler.speculation.settings import SpeculationSettings
from llamaclust.core.errors import UsageError
from llamaclust.core.gpus import UNUSED_BY_PARTS, gpu_names
from llamaclust.core.limits import StageLimits
from llamaclust.core.sampler.bounds import MAX_CONTEXT_TOKENS
from llamaclust.model.costs import ModelCosts
from llamaclust.model.loader import Model
from llamaclust.model.nextn.program import check_nextn, has_nextn
from llamaclust.wire.microbatch.codec import MAX_MICROBATCH_BYTES
from llamaclust.wire.microbatch.frames import MAX_FRAME_BYTES

_OUTPUTS = 64
_KV_TOKENS = 8192
CONTEXT_TOKENS = 4096
"""Context length, or less if the model's own is shorter, that a model must have room for. Without `context_length`,
plans place layers for it, and then choose a longer one if the memory that is left suffices."""


def context_bounds(config: ClusterConfig, model: Model) -> ContextBounds:
    """Returns the context lengths among which plans choose. Raises UsageError if `context_length` is too long."""
    trained, tokens = model.hyperparameters.context_length, config.context_length
    longest = longest_context(model)
    longest_key = MAX_CONTEXT_TOKENS if longest == trained else longest
    if tokens is not None:
        if tokens > longest:
            limit = "the model was trained for" if longest == trained else "this encoder can compute at once only"
            raise UsageError(f"context_length is {tokens}, but {limit} {longest} tokens; set {longest} or less")
        return ContextBounds(tokens, tokens, trained, ContextBound.KEY, longest_key)
    least = min(CONTEXT_TOKENS, longest)
    lengths = {
        ContextBound.MODEL: min(trained, MAX_CONTEXT_TOKENS),
        ContextBound.ROPE: model.short_rope_context or trained,
        ContextBound.ENCODER: trained if model.is_causal else least,
        ContextBound.KV_DISK: _context_on_disk(config, model) or trained,
    }
    bound = min(lengths, key=lengths.__getitem__)
    return ContextBounds(least, max(least, lengths[bound]), trained, bound, longest_key)


def _context_on_disk(config: ClusterConfig, model: Model) -> int | None:
    """Returns the longest context with which `kv_disk` can keep all layers. None if there is no limit."""
    if model.window is None or all(worker.kv_disk is None for worker in config.workers):
        return None
    return WindowGroup(model.window, max_batch_tokens(config, model)).shared_context


def check_distinct(models: Iterable[tuple[str, str]]) -> None:
    names: dict[str, str] = {}
    for name, model_id in models:
        if (other := names.setdefault(model_id, name)) != name:
            what = f"models: {other!r} and {name!r} are the same file"
            raise UsageError(f"{what}; list only {other!r}, with {name!r} as an alias and with the adapters of both")


def check_plan(config: ClusterConfig, model: Model) -> None:
    """Raises UsageError if the cluster file does not fit the model, for example if its context is too long."""
    context_bounds(config, model)
    _check_frames(config, model)
    _check_kv_disk(config, model)
    _check_mtp(config, model)
    check_placement(config, model)
    if config.plan is not None:
        entries = config.plan if config.awaits_any else ()
        names = [name for entry in entries for name in entry.names] or [worker.name for worker in config.workers]
        shards = manual_shards(config)
        checked(manual_plan(config), names, model.layer_count * shards, shards)
        check_division(config, model, shards)
        gpus = {worker.name: gpu_names(worker.device) for worker in config.workers}
        check_parts_on_gpus(config, shards, gpus)
        check_groups(config, model, gpus)


def _check_frames(config: ClusterConfig, model: Model) -> None:
    if len(config.workers) < 2 or not (token_bytes := model.hidden_bytes):
        return
    room = (MAX_FRAME_BYTES - MAX_MICROBATCH_BYTES) // token_bytes
    if (most := max_batch_tokens(config, model)) > room:
        cause = f"prefill_chunk and max_sequences allow microbatches of {most} tokens"
        what = f"a message between workers holds only {room} tokens of {token_bytes} bytes"
        raise UsageError(f"{cause}, but {what}; lower one of the keys")


def says_placement(config: ClusterConfig) -> bool:
    numbers = [config.cpu_moe, *(worker.cpu_moe for worker in config.workers)]
    return bool(config.placement) or any(number is not None for number in numbers)


def check_division(config: ClusterConfig, model: Model, expert_shards: int) -> None:
    if expert_shards == 1:
        return
    if model.hyperparameters.expert_count < expert_shards:
        count = f"only {most}" if (most := model.hyperparameters.expert_count) else "no"
        what = f"the plan divides a layer's experts into {expert_shards} parts"
        raise UsageError(f"{what}, but the model's layers have {count} experts")
    if says_placement(config):
        raise UsageError("placement and cpu_moe need whole layers, but the plan divides some layers; remove both keys")
    if any(worker.kv_disk for worker in config.workers):
        raise UsageError("kv_disk needs stages of whole layers, but the plan divides some layers; remove kv_disk")
    row_bytes = model.costs(config.kv_type, expert_shards).cut_bytes
    room = (MAX_FRAME_BYTES - MAX_MICROBATCH_BYTES) // max(row_bytes, 1)
    if (most := max_batch_tokens(config, model)) > room:
        cause = f"prefill_chunk and max_sequences allow microbatches of {most} tokens"
        what = f"a message between the parts of a divided layer holds only {room} tokens of {row_bytes} bytes"
        raise UsageError(f"{cause}, but {what}; lower one of the keys")


def check_parts_on_gpus(config: ClusterConfig, expert_shards: int, gpus: Mapping[str, Sequence[str]]) -> None:
    """Raises UsageError if a manual plan divides layers and uses workers with GPUs. `gpus` has GPU names by worker."""
    for entry in config.plan or () if expert_shards > 1 else ():
        for name in entry.names:
            if devices := gpus.get(name):
                what = f"{', '.join(devices)} of {name} would be unused: {UNUSED_BY_PARTS}"
                raise UsageError(f"the plan: {what}; set the device of {name} to cpu, or divide no layers")


def _check_kv_disk(config: ClusterConfig, model: Model) -> None:
    if all(worker.kv_disk is None for worker in config.workers):
        return
    group = window_group(model.window, context_bounds(config, model).least, max_batch_tokens(config, model))
    if group is not None:
        why = f"KV memory of layers with a window ({group.window} tokens) is not kept on disk"
        raise UsageError(f"kv_disk: {why}, but this model has such layers; remove kv_disk")
    if model.has_states:
        why = "recurrent states of sequences are not kept on disk"
        raise UsageError(f"kv_disk: {why}, but this model has recurrent layers; remove kv_disk")


def _check_mtp(config: ClusterConfig, model: Model) -> None:
    if not uses_mtp(config):
        return
    check_nextn(model)
    if manual_shards(config) > 1:
        why = "the MTP head needs whole layers, but the plan divides the experts of some layers"
        raise UsageError(f"speculative.mtp: {why}; remove speculative.mtp, or divide no layers")


def manual_plan(config: ClusterConfig) -> tuple[Assignment, ...]:
    """Returns the cluster file's `plan`, with bounds in layer parts. With 2 parts per layer, 4.5 becomes 9."""
    shards = manual_shards(config)
    parts = ((entry, *entry.layers) for entry in config.plan or ())
    return tuple(
        Assignment(entry.names, int(start * shards), int(end * shards), entry.all_shares) for entry, start, end in parts
    )


def manual_shards(config: ClusterConfig) -> int:
    places = (place for entry in config.plan or () for place in entry.layers)
    return max((Fraction(place).denominator for place in places), default=1)


def capacity_of(config: ClusterConfig, context_length: int, model: Model | None = None) -> Capacity:
    return Capacity(
        context_length=context_length,
        max_sequences=config.max_sequences,
        max_outputs=max(_OUTPUTS, config.max_sequences),
        rows=microbatch_rows(model, context_length),
        prefill_chunk=config.prefill_chunk,
        kv_type=config.kv_type,
        prefix_cache=config.prefix_cache,
        max_waiting=config.max_waiting,
        mtp=uses_mtp(config),
    )


def max_batch_tokens(config: ClusterConfig, model: Model) -> int:
    return capacity_of(config, config.context_length or CONTEXT_TOKENS, model).max_batch_tokens


def kv_tokens(config: ClusterConfig) -> int | None:
    """Returns the number of tokens to plan KV memory for. None stands for `max_sequences` full-length sequences."""
    if "max_sequences" not in config.model_fields_set:
        return _KV_TOKENS
    return config.max_sequences * CONTEXT_TOKENS if config.context_length is None else None


def uses_mtp(config: ClusterConfig) -> bool:
    return config.speculative is not None and config.speculative.mtp


def unused_mtp(config: ClusterConfig, model: Model) -> str | None:
    if config.speculative is None or config.speculative.mtp or not has_nextn(model):
        return None
    use = "set `speculative: {mtp: true}` to use it"
    return f"{config.model_name} has a head for multi-token prediction, which is not loaded: {use}"


def model_costs(config: ClusterConfig, model: Model, expert_shards: int = 1) -> ModelCosts:
    """Returns the model's memory and compute costs for the planner. Raises UsageError if `speculative.mtp` is set, but
    the model has no MTP head."""
    return capacity_of(config, CONTEXT_TOKENS).costs(model, expert_shards)


def plan_limits(config: ClusterConfig, plan: Plan, model: Model | None = None) -> StageLimits:
    capacity = capacity_of(config, plan.context_length, model)
    return capacity.stage_limits(_blocks(plan), plan.expert_shards, wide_tiles=plan.wide_tiles)


def _blocks(plan: Plan) -> BlockCounts:
    return BlockCounts(plan.kv_blocks, plan.window_blocks, plan.state_blocks)


def speculation_settings(config: ClusterConfig, draft_model: DraftModel | None) -> SpeculationSettings | None:
    given = config.speculative
    if given is None:
        return None
    drafters = SharedDrafters(given.shared_answers) if given.shared_answers else NgramDrafters()
    return SpeculationSettings(drafters, given.max_window, draft_model, given.mtp)


def scheduler_settings(
    config: ClusterConfig,
    model: Model,
    plan: Plan,
    speculation: SpeculationSettings | None,
    adapters: Mapping[int, str] | None = None,
) -> SchedulerSettings:
    """Returns scheduler settings with the same limits as the plan's stages. `adapters` maps adapter numbers to digests.
    It defaults to the model's adapters."""
    capacity = capacity_of(config, plan.context_length, model)
    settings = capacity.scheduler_settings(model, _blocks(plan), speculation)
    return settings if adapters is None else replace(settings, adapters=adapters)

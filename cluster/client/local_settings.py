"""Settings of a model in this process, and what its scheduler and stage make of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llamaclust.cluster.scheduler.drafting.ngram import NgramDrafters
from llamaclust.cluster.scheduler.kv.groups import KvGroups
from llamaclust.cluster.scheduler.settings import SchedulerSettings
from llamaclust.cluster.scheduler.speculation.settings import SpeculationSettings
from llamaclust.core.errors import UsageError
from llamaclust.core.limits import MAX_BATCH_TOKENS, MAX_KV_BLOCKS, StageLimits, max_embedded_rows
from llamaclust.model.kv_type import KvType
from llamaclust.model.loader import Model
from llamaclust.model.placement import PlacementRule
from llamaclust.model.program import KV_BLOCK_TOKENS

_CONTEXT_TOKENS = 4096
ROWS = 512
"""Rows of a microbatch, unless chunks of prompts are larger."""
OUTPUTS = 256
"""The most outputs of a microbatch."""


@dataclass(frozen=True, slots=True)
class LocalSettings:
    """Settings of a model in this process."""

    context_length: int | None = None  # tokens of a sequence; None: what the model was made for, 4096 at most
    max_sequences: int = 8  # together; more wait
    prefill_chunk: int | None = None  # prompt tokens computed at once, at most; None: as the scheduler thinks best
    prefix_cache: bool = True
    kv_blocks: int | None = None  # of 16 tokens; None: two whole contexts
    kv_type: KvType = KvType.F16  # of keys and values
    chat_template: str | None = None  # name of a built-in one or a file; None: the model's
    speculation: bool = True  # several tokens a step where drafts of them pay
    draft_model: Path | None = None  # a small model with the same tokens that drafts
    mtp: bool = False  # the model's own head for multi-token prediction drafts
    device: str = "cpu"  # or GPUs beside the processor: "cuda:0", "cuda:0,cuda:1"
    gpu_layers: int | None = None  # on these, the last ones; None: as many as they have memory for
    gpu_memory_bytes: int | None = None  # cap on what is taken of each; None: what is free there
    cpu_moe: int | None = None  # so many first layers have their experts in RAM; None: those whose experts do not fit
    placement: tuple[PlacementRule, ...] = ()  # for tensors; the first one that matches decides, before `cpu_moe`
    experts_cache_bytes: int | None = None  # of a GPU, at most, for copies of experts in RAM; None: what is left


def scheduler_settings(model: Model, settings: LocalSettings) -> SchedulerSettings:
    trained = model.hyperparameters.context_length
    context = settings.context_length or min(trained, _CONTEXT_TOKENS)
    chunk = settings.prefill_chunk
    if not 0 < context <= trained:
        raise UsageError(f"context_length: {context}: the model was made for {trained} tokens; set {trained} or less")
    for name, value, most in (
        ("max_sequences", settings.max_sequences, OUTPUTS),
        ("prefill_chunk", chunk, MAX_BATCH_TOKENS - settings.max_sequences),
        ("kv_blocks", settings.kv_blocks, MAX_KV_BLOCKS - blocks_of(context)),
    ):
        if value is not None and not 0 < value <= most:
            raise UsageError(f"{name}: {value}: set 1 to {most}")
    if settings.kv_type not in set(KvType):
        raise UsageError(f"kv_type: {settings.kv_type}: set one of {', '.join(KvType)}")
    kv_blocks = settings.kv_blocks or 2 * blocks_of(context)
    max_batch_tokens = max(ROWS, chunk or 0) + settings.max_sequences
    costs = model.costs(KvType(settings.kv_type))
    groups = KvGroups.of(costs, context, settings.max_sequences, max_batch_tokens)
    return SchedulerSettings(
        model_id=model.model_id,
        vocabulary=model.hyperparameters.vocabulary_size,
        context_length=context,
        kv_blocks=kv_blocks,
        kv_type=KvType(settings.kv_type),
        max_sequences=settings.max_sequences,
        max_batch_tokens=max_batch_tokens,
        max_outputs=OUTPUTS,
        max_embedded_rows=max_embedded_rows(model.hyperparameters.embedding_length),
        embedding_length=model.embedding_width,
        prefill_chunk=chunk,
        prefix_cache=settings.prefix_cache and model.is_causal,
        whole_prompts=not model.is_causal,
        generates=model.generates,
        speculation=SpeculationSettings(NgramDrafters(), mtp=settings.mtp) if settings.speculation else None,
        window=None if groups.window is None else groups.window.window,
        window_blocks=groups.window_blocks(kv_blocks),
        has_states=model.has_states,
        state_blocks=groups.state_blocks(kv_blocks),
        state_span=groups.state_span,
    )


def blocks_of(tokens: int) -> int:
    return -(-tokens // KV_BLOCK_TOKENS)


def stage_limits(scheduling: SchedulerSettings, own: tuple[int, int]) -> StageLimits:
    group = scheduling.window_group
    return StageLimits(
        max_batch_tokens=scheduling.max_batch_tokens,
        max_outputs=scheduling.max_outputs,
        max_sequences=scheduling.max_sequences,
        max_context_tokens=scheduling.context_length,
        kv_blocks=scheduling.kv_blocks + own[1],
        kv_type=scheduling.kv_type.value,
        window_blocks=0 if group is None else scheduling.window_blocks + group.sequence_blocks + group.row_blocks,
        state_blocks=scheduling.state_blocks and scheduling.state_blocks + 1,
        nextn=scheduling.has_mtp,
    )

from __future__ import annotations

from dataclasses import dataclass

from llamaclust.cluster.scheduler.kv.groups import KvGroups
from llamaclust.cluster.scheduler.settings import SchedulerSettings
from llamaclust.cluster.scheduler.speculation.settings import SpeculationSettings
from llamaclust.core.limits import MAX_BATCH_TOKENS, StageLimits, max_embedded_rows
from llamaclust.model.costs import ModelCosts
from llamaclust.model.kv_type import KvType
from llamaclust.model.loader import Model
from llamaclust.model.nextn.costs import with_nextn
from llamaclust.model.program import KV_BLOCK_TOKENS

ROWS = 512


def longest_context(model: Model) -> int:
    """Returns the maximum number of tokens in a sequence. An encoder computes a prompt in one microbatch."""
    trained = model.hyperparameters.context_length
    if model.is_causal:
        return trained
    return min(trained, MAX_BATCH_TOKENS, max_embedded_rows(model.hyperparameters.embedding_length))


def microbatch_rows(model: Model | None, context_length: int) -> int:
    """Returns the number of rows that a microbatch must be able to hold, in addition to one row per sequence. They hold
    a whole prompt of an encoder, and an image whose rows attend to each other."""
    if model is not None and not model.is_causal:
        return max(ROWS, min(context_length, longest_context(model)))
    projector = None if model is None else model.projector
    if projector is None or not projector.is_bidirectional:
        return ROWS
    return max(ROWS, min(projector.max_rows, MAX_BATCH_TOKENS // 2))


def blocks_of(tokens: int) -> int:
    return -(-tokens // KV_BLOCK_TOKENS)


@dataclass(frozen=True, slots=True)
class BlockCounts:
    """Numbers of ordinary KV blocks, of separate blocks for sliding-window layers, and of recurrent state blocks."""

    kv: int
    window: int = 0
    states: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    context_length: int
    max_sequences: int
    max_outputs: int  # Maximum number of sampled and scored rows in a microbatch.
    # Rows in a microbatch, excluding one row per sequence. A larger `prefill_chunk` replaces this number.
    rows: int = ROWS
    prefill_chunk: int | None = None  # Maximum prompt tokens in a microbatch. None limits its predicted time instead.
    kv_type: KvType = KvType.F16
    prefix_cache: bool = True
    max_waiting: int = 256
    mtp: bool = False  # True if the last stage drafts tokens with the model's MTP head.

    @property
    def max_batch_tokens(self) -> int:
        return min(max(self.rows, self.prefill_chunk or 0) + self.max_sequences, MAX_BATCH_TOKENS)

    def costs(self, model: Model, expert_shards: int = 1) -> ModelCosts:
        """Returns the model's costs, with its MTP head if `mtp` is set. Raises UsageError if that head is missing."""
        costs = model.costs(self.kv_type, expert_shards)
        return with_nextn(model, costs, self.kv_type) if self.mtp and expert_shards == 1 else costs

    def groups(self, costs: ModelCosts) -> KvGroups:
        return KvGroups.of(costs, self.context_length, self.max_sequences, self.max_batch_tokens)

    def blocks(self, model: Model, kv_blocks: int) -> BlockCounts:
        groups = self.groups(self.costs(model))
        return BlockCounts(kv_blocks, groups.window_blocks(kv_blocks), groups.state_blocks(kv_blocks))

    def stage_limits(self, blocks: BlockCounts, expert_shards: int = 1, *, wide_tiles: bool = False) -> StageLimits:
        return StageLimits(
            max_batch_tokens=self.max_batch_tokens,
            max_outputs=self.max_outputs,
            max_sequences=self.max_sequences,
            max_context_tokens=self.context_length,
            kv_blocks=blocks.kv,
            kv_type=self.kv_type.value,
            window_blocks=blocks.window,
            state_blocks=blocks.states,
            expert_shards=expert_shards,
            nextn=self.mtp,
            wide_tiles=wide_tiles,
        )

    def scheduler_settings(
        self, model: Model, blocks: BlockCounts, speculation: SpeculationSettings | None = None
    ) -> SchedulerSettings:
        return SchedulerSettings(
            model_id=model.model_id,
            vocabulary=model.hyperparameters.vocabulary_size,
            context_length=self.context_length,
            kv_blocks=blocks.kv,
            kv_type=self.kv_type,
            max_sequences=self.max_sequences,
            max_waiting=self.max_waiting,
            max_batch_tokens=self.max_batch_tokens,
            max_outputs=self.max_outputs,
            max_embedded_rows=max_embedded_rows(model.hyperparameters.embedding_length),
            embedding_length=model.embedding_width,
            prefill_chunk=self.prefill_chunk,
            prefix_cache=self.prefix_cache and model.is_causal,
            whole_prompts=not model.is_causal,
            generates=model.generates,
            speculation=speculation if model.generates else None,
            adapters=model.adapter_digests,
            window=model.window if blocks.window else None,
            window_blocks=blocks.window,
            has_states=model.has_states,
            state_blocks=blocks.states,
            image_width=model.image_width,
            rope_sections=model.rope_sections,
            state_span=self.groups(self.costs(model)).state_span,
        )

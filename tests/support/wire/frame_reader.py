"""Frame readers with given limits, for tests without a stage."""

from __future__ import annotations

from dataclasses import replace

from llamaclust.core.bounds import MAX_TEXT
from llamaclust.core.limits import (
    MAX_ADAPTER_SCALE,
    MAX_ADAPTERS,
    MAX_BATCH_TOKENS,
    MAX_KV_BLOCKS,
    MAX_SEQUENCES,
    StageLimits,
)
from llamaclust.core.sampler.bounds import MAX_CONTEXT_TOKENS, MAX_DRAFTED_TOKENS, MAX_VOCABULARY
from llamaclust.kernels._native import FrameReader
from llamaclust.kernels.backend import Batch
from llamaclust.wire.microbatch.codec import MAX_MICROBATCH_BYTES, MAX_STAGES, encode_microbatch
from llamaclust.wire.microbatch.frames import encode_hidden
from llamaclust.wire.microbatch.messages import Microbatch
from llamaclust.worker.stage.stage_runner import batch_of

MODEL_ID, VOCABULARY, ADAPTERS, GIVEN_WIDTH, SECTIONS = "ab12", 300, 3, 2, 3
LIMITS = StageLimits(
    max_batch_tokens=12, max_outputs=5, max_sequences=4, max_context_tokens=96, kv_blocks=40, window_blocks=9
)


def reader(
    hidden_width: int = 0, window: int = 0, state_blocks: int = 0, images: tuple[int, int] = (GIVEN_WIDTH, SECTIONS)
) -> FrameReader:
    """Creates a stage's reader with small limits. `hidden_width` is 0 for the first stage, `window` is 0 if no layer
    has one. `images`: the width of an image's row and the rope sections, 0 if the model has none."""
    limits = replace(LIMITS, state_blocks=state_blocks)
    return _reader(MODEL_ID, limits, VOCABULARY, ADAPTERS, hidden_width, window, images)


def build_batch(
    microbatch: Microbatch, limits: StageLimits, vocabulary: int, window: int | None = None, adapters: int = 0
) -> Batch:
    """Returns the batch that a first stage reads. `window`: that of one of its layers; `adapters`: their number."""
    window = window or 0 if limits.gives_up(window) else 0
    reader = _reader(microbatch.model_id, limits, vocabulary, adapters, 0, window)
    return batch_of(reader.read(encode_hidden(encode_microbatch(microbatch))))


def wire_reader(model_id: str, hidden_width: int = 0, state_blocks: int = 0) -> FrameReader:
    """Creates a reader with the largest limits of all stages, but fixed rope sections and width of image rows."""
    limits = StageLimits(
        *(MAX_BATCH_TOKENS, MAX_BATCH_TOKENS, MAX_SEQUENCES, MAX_CONTEXT_TOKENS, MAX_KV_BLOCKS),
        state_blocks=state_blocks,
    )
    return _reader(model_id, limits, MAX_VOCABULARY, MAX_ADAPTERS, hidden_width)


def _reader(
    model_id: str,
    limits: StageLimits,
    vocabulary: int,
    adapters: int,
    hidden_width: int,
    window: int = 0,
    images: tuple[int, int] = (GIVEN_WIDTH, SECTIONS),
) -> FrameReader:
    return FrameReader(
        model_id,
        max_batch_tokens=limits.max_batch_tokens,
        max_outputs=limits.max_outputs,
        max_sequences=limits.max_sequences,
        max_context_tokens=limits.max_context_tokens,
        kv_blocks=limits.kv_blocks,
        vocabulary=vocabulary,
        window=window,
        window_blocks=limits.window_blocks,
        state_blocks=limits.state_blocks,
        adapters=adapters,
        hidden_width=hidden_width,
        given_width=images[0],
        rope_sections=images[1],
        max_stages=MAX_STAGES,
        max_rows=MAX_BATCH_TOKENS,
        max_kv_blocks=MAX_KV_BLOCKS,
        max_drafts=MAX_DRAFTED_TOKENS,
        max_scale=MAX_ADAPTER_SCALE,
        max_header_bytes=MAX_MICROBATCH_BYTES,
        max_failure_bytes=4 * MAX_TEXT,
    )

"""A reader of frames with small limits, for tests without a stage."""

from __future__ import annotations

from llamaclust.core.limits import MAX_BATCH_TOKENS, MAX_KV_BLOCKS, StageLimits
from llamaclust.kernels._native import FrameReader
from llamaclust.wire.microbatch.codec import MAX_MICROBATCH_BYTES, MAX_STAGES

MODEL_ID, VOCABULARY = "ab12", 300
LIMITS = StageLimits(
    max_batch_tokens=12, max_outputs=5, max_sequences=4, max_context_tokens=96, kv_blocks=40, window_blocks=9
)


def reader(hidden_width: int = 0, window: int = 0) -> FrameReader:
    """Of a stage that gets hidden states of this width, or is the first one, and of whose layers some have a window."""
    return FrameReader(
        MODEL_ID,
        max_batch_tokens=LIMITS.max_batch_tokens,
        max_outputs=LIMITS.max_outputs,
        max_sequences=LIMITS.max_sequences,
        max_context_tokens=LIMITS.max_context_tokens,
        kv_blocks=LIMITS.kv_blocks,
        vocabulary=VOCABULARY,
        window=window,
        window_blocks=LIMITS.window_blocks,
        hidden_width=hidden_width,
        max_stages=MAX_STAGES,
        max_rows=MAX_BATCH_TOKENS,
        max_kv_blocks=MAX_KV_BLOCKS,
        max_header_bytes=MAX_MICROBATCH_BYTES,
    )

"""KV memory on a GPU: what a layer's blocks take. Their layout is the kernels' own (src/attention/kv.cuh)."""

from __future__ import annotations

from collections.abc import Sequence

from llamaclust.core.limits import StageLimits
from llamaclust.model.program import KV_BLOCK_TOKENS, Attention

_LAYER_ALIGNMENT_BYTES = 256


def block_bytes(step: Attention) -> int:
    """One block of a layer: as many bytes as on the CPU, so that a plan holds on both."""
    return KV_BLOCK_TOKENS * step.kv_token_bytes


def layer_offsets(steps: Sequence[Attention], limits: StageLimits) -> list[int]:
    """Where each layer's block 0 begins in one piece of memory, and at last how many bytes that takes."""
    offsets = [0]
    for step in steps:
        end = offsets[-1] + block_bytes(step) * limits.layer_blocks(step.window)
        offsets.append(-(-end // _LAYER_ALIGNMENT_BYTES) * _LAYER_ALIGNMENT_BYTES)
    return offsets

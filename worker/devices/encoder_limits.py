"""The limits with which an image encoder is loaded, and the memory that it takes."""

from __future__ import annotations

from dataclasses import dataclass

from llamaclust.core.limits import StageLimits
from llamaclust.model.program import KV_BLOCK_TOKENS
from llamaclust.model.projectors.projector import Projector

ENCODER_NICENESS = 5
"""Niceness of an encoder's threads relative to a stage's threads, which get three times as much time."""


@dataclass(frozen=True, slots=True)
class EncoderMemory:
    """Memory of an image encoder in bytes. The workspace includes KV memory, and one tile's input and output."""

    weight_bytes: int
    workspace_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.weight_bytes + self.workspace_bytes

    @property
    def parts(self) -> dict[str, int]:
        return {"weights": self.weight_bytes, "workspace": self.workspace_bytes}


def encoder_limits(projector: Projector) -> StageLimits:
    """Returns the limits of a stage that runs one image tile at a time. A tile may have more rows than a text batch."""
    rows = projector.most_program_rows
    return StageLimits(
        max_batch_tokens=rows,
        max_outputs=1,
        max_sequences=1,
        max_context_tokens=rows,
        kv_blocks=-(-rows // KV_BLOCK_TOKENS),
    )

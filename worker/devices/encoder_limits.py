"""The limits for which an image encoder is loaded, and the memory that it takes."""

from __future__ import annotations

from dataclasses import dataclass

from llamaclust.core.limits import StageLimits
from llamaclust.model.program import KV_BLOCK_TOKENS
from llamaclust.model.projectors.projector import Projector

ENCODER_NICENESS = 5
"""The niceness of the encoder's threads, added to the worker's niceness. If a stage and the encoder both want a core,
Linux gives the stage three times as much time. With 10 it would give nine times as much, and images would be late."""


@dataclass(frozen=True, slots=True)
class EncoderMemory:
    """An encoder's memory in bytes. The workspace includes KV memory, a tile's patches, and the tile's rows."""

    weight_bytes: int
    workspace_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.weight_bytes + self.workspace_bytes

    @property
    def parts(self) -> dict[str, int]:
        return {"weights": self.weight_bytes, "workspace": self.workspace_bytes}


def encoder_limits(projector: Projector) -> StageLimits:
    """Returns the limits of a stage that runs one tile at a time. They exceed the limits of a text model's stages."""
    rows = projector.most_program_rows
    return StageLimits(
        max_batch_tokens=rows,
        max_outputs=1,
        max_sequences=1,
        max_context_tokens=rows,
        kv_blocks=-(-rows // KV_BLOCK_TOKENS),
    )

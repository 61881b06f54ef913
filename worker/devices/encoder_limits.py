"""The limits for which an encoder of images is loaded, and its memory as a value."""

from __future__ import annotations

from dataclasses import dataclass

from llamaclust.core.limits import StageLimits
from llamaclust.model.program import KV_BLOCK_TOKENS
from llamaclust.model.projectors.projector import Projector

ENCODER_NICENESS = 5
"""The niceness of the encoder's threads above that of the worker. On a core that both want, Linux gives a stage three
times as much time as the encoder. With 10 it would be nine times as much, and an image beside much text late."""


@dataclass(frozen=True, slots=True)
class EncoderMemory:
    """The workspace includes KV memory, a tile's patches and its rows."""

    weight_bytes: int
    workspace_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.weight_bytes + self.workspace_bytes

    @property
    def parts(self) -> dict[str, int]:
        return {"weights": self.weight_bytes, "workspace": self.workspace_bytes}


def encoder_limits(projector: Projector) -> StageLimits:
    """Returns the limits of a stage that runs one tile at a time. They exceed those of a text model's stages."""
    rows = projector.most_program_rows
    return StageLimits(
        max_batch_tokens=rows,
        max_outputs=1,
        max_sequences=1,
        max_context_tokens=rows,
        kv_blocks=-(-rows // KV_BLOCK_TOKENS),
    )

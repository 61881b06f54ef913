from __future__ import annotations

from dataclasses import dataclass

from llamaclust.model.program import RopeTable
from llamaclust.model.steps.options import RopeStyle


@dataclass(frozen=True, slots=True)
class Rotation:
    """RoPE of queries and keys. Channel pair i of a head is rotated by the patch's row if sections[i] is 0, and by its
    column if sections[i] is 1. If `split`, a head's halves are rotated separately, each with its half of `sections`."""

    style: RopeStyle
    table: RopeTable
    sections: tuple[int, ...]
    split: bool = False


@dataclass(frozen=True, slots=True)
class VisionAttention:
    """Options of an attention block of an image encoder. If `grouped`, a patch attends only to its own window. A
    `scale` of None means 1 / sqrt(head_dim). If `unit_values`, each head's values have an RMS norm without weights. If
    not `post_norm`, a tensor `attn_post_norm` does not belong to the attention block."""

    rotation: Rotation | None = None
    grouped: bool = False
    scale: float | None = None
    unit_values: bool = False
    post_norm: bool = True

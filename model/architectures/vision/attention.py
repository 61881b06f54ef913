from __future__ import annotations

from dataclasses import dataclass

from llamaclust.model.program import RopeTable
from llamaclust.model.steps.options import RopeStyle


@dataclass(frozen=True, slots=True)
class Rotation:
    """The rotation of queries and keys: pair i of a head turns by the position in section sections[i]. If `split`, each
    half of a head is rotated like a head of its own, with `table`, and has its half of `sections`."""

    style: RopeStyle
    table: RopeTable
    sections: tuple[int, ...]
    split: bool = False


@dataclass(frozen=True, slots=True)
class VisionAttention:
    """Options of an attention block. If `grouped`, a row sees its window only. `scale` is 1 / sqrt(head_dim) by
    default. With `unit_values`, each head's value has an RMS norm without weights."""

    rotation: Rotation | None = None
    grouped: bool = False
    scale: float | None = None
    unit_values: bool = False

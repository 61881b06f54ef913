"""Where another device computes a part of a layer."""

from __future__ import annotations

from dataclasses import dataclass

from llamaclust.model.row_steps import Buffer


@dataclass(frozen=True, slots=True)
class Exchange:
    """out[r] = what another device computes of row r of `reads`: experts that lie there, say. Of a program that is
    divided by kinds of tensors."""

    reads: tuple[Buffer, ...]
    out: Buffer

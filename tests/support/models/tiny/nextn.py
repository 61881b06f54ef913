"""Tensors of MTP heads in addition to those of their layers."""

from __future__ import annotations

from collections.abc import Iterator

from support.models.tiny.shape import Tiny
from support.models.tiny_model import RandomTensor, matrix, norm


def further_tensors(tiny: Tiny) -> Iterator[RandomTensor]:
    for layer in range(tiny.layers - tiny.nextn, tiny.layers):
        name = f"blk.{layer}.nextn"
        yield matrix(f"{name}.eh_proj", tiny.hidden, 2 * tiny.hidden)
        for part in ("enorm", "hnorm", "shared_head_norm"):
            yield norm(f"{name}.{part}", tiny.hidden)

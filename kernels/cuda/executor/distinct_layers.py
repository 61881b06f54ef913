"""Removes repeated layers from a program. Planning the shorter program is faster and gives the same buffer sizes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from llamaclust.kernels.cuda.launches.attention import attention_steps
from llamaclust.kernels.cuda.launches.matmul import Weights
from llamaclust.model.program import Program, Step, weights_of

_LAYER = re.compile(r"blk\.(\d+)\.")
_OUTSIDE = -1
_TAIL = 3
"""The maximum number of steps at a layer's end that are fused with the first steps of the next layer."""


def distinct_layers(program: Program, weights: Mapping[str, Weights]) -> Program:
    """Keeps one pair of adjacent layers of each kind. Pairs suffice, because no launch spans more than two layers."""
    if any(step.shares_kv for step in attention_steps(program)):
        return program  # Some layers refer to other layers by number.
    groups = _by_layer(program.steps)
    kinds = [_kind(steps, weights) for steps in groups]
    tails = [_kind(steps[-_TAIL:], weights) for steps in groups]
    first: dict[tuple[str, str], int] = {}
    for at, pair in enumerate(zip(tails, kinds[1:], strict=False)):
        first.setdefault(pair, at)
    kept = sorted({at + beside for at in first.values() for beside in (0, 1)})
    return replace(program, steps=tuple(step for at in kept for step in groups[at]))


def _by_layer(steps: Sequence[Step]) -> list[list[Step]]:
    groups: list[list[Step]] = [[]]
    current = _OUTSIDE
    for step in steps:
        names = weights_of((step,))
        found = [int(match[1]) for name in names if (match := _LAYER.match(name)) is not None]
        own = found[0] if found else _OUTSIDE if names else current
        if own != current:
            groups.append([])
            current = own
        groups[-1].append(step)
    return groups


def _kind(steps: Sequence[Step], weights: Mapping[str, Weights]) -> str:
    names = weights_of(steps)
    number = next((match[1] for name in names if (match := _LAYER.match(name)) is not None), None)
    types = [(weights[name].quant_type, weights[name].shape) for name in names]
    text = repr((steps, types))
    return text if number is None else re.sub(rf"\bblk\.{number}\.|\blayer={number}\b", "layer", text)

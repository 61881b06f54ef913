"""Removes repeated layers from a program. Planning the shorter program is faster and gives the same buffer sizes."""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import fields, replace
from functools import cache
from typing import Any

from llamaclust.model.gguf.tensors import Tensor
from llamaclust.model.program import Attention, Program, SequenceState, Step, weights_of
from llamaclust.model.steps.step import StepFacts

_LAYER = re.compile(r"blk\.(\d+)\.")
_OUTSIDE = -1
_TAIL = 3
"""The maximum number of steps at a layer's end that are fused with the first steps of the next layer."""


def distinct_layers(program: Program, tensors: Mapping[str, Tensor]) -> Program:
    """Keeps equal pairs of adjacent layers once. Buffer sizes stay the same, as no fused step spans three layers."""
    if any(isinstance(step, Attention) and step.shares_kv for step in program.steps):
        return program  # Some layers refer to other layers by number.
    groups = _by_layer(program.steps)
    kinds = [_kind(steps, tensors) for steps in groups]
    tails = [_kind(steps[-_TAIL:], tensors) for steps in groups]
    first: dict[tuple[Hashable, Hashable], int] = {}
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


def _kind(steps: Sequence[Step], tensors: Mapping[str, Tensor]) -> Hashable:
    return tuple(_form(step, tensors) for step in steps)


def _form(value: Hashable, tensors: Mapping[str, Tensor]) -> Hashable:
    """Returns `value` without layer numbers and with the types and shapes of tensors, for comparisons of layers."""
    if names := _part_names(type(value)):
        return type(value), *(_form(getattr(value, name), tensors) for name in names)
    if isinstance(value, str) and (tensor := tensors.get(value)) is not None:
        return _LAYER.sub("", value), tensor.quant_type, tensor.packed_as, tensor.shape
    return value


@cache
def _part_names(kind: type[Any]) -> tuple[str, ...]:
    """Returns the field names of a class of steps or states, except `layer`. Returns () for other classes."""
    is_step = issubclass(kind, StepFacts | SequenceState)
    return tuple(field.name for field in fields(kind) if field.name != "layer") if is_step else ()

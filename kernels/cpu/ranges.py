from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any, Final

from llamaclust.core.limits import StageLimits
from llamaclust.model.program import Program

_MAX: Final = (1 << 31) - 1


def check_ranges(program: Program, limits: StageLimits) -> None:
    for value in (limits, program.hidden, program.out, *program.steps, *program.states):
        for place, number in _integers(value):
            if not -_MAX <= number <= _MAX:
                raise ValueError(f"{type(value).__name__} has {place} = {number}, which exceeds the maximum of {_MAX}")


def _integers(value: Any, prefix: str = "") -> Iterator[tuple[str, int]]:
    for name in _field_names(value.__class__):
        item = getattr(value, name)
        if isinstance(item, int):
            yield f"{prefix}{name}", item
        elif is_dataclass(item):
            yield from _integers(item, f"{prefix}{name}.")


@cache
def _field_names(kind: Any) -> tuple[str, ...]:
    return tuple(field.name for field in fields(kind))

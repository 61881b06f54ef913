from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
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
    for field in fields(value):
        item = getattr(value, field.name)
        if isinstance(item, int):
            yield f"{prefix}{field.name}", item
        elif is_dataclass(item):
            yield from _integers(item, f"{prefix}{field.name}.")

"""A case of the benchmarks: a dataclass whose fields are options, and groups of variants that are measured in turns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

Measures = Mapping[str, float | str | bytes]
"""Figures, texts and bytes by name. Texts are only shown. Bytes must be equal for all variants of a turn."""
Variant = Callable[[int], Awaitable[Measures]]
"""Measures in the turn of this number. Variants that draw prompts draw equal prompts in the same turn."""


@dataclass(slots=True)
class Group:
    """Variants, which are compared with the first one. `goals` are for the ratios, or for the figures of a single
    variant. If there are goals, only figures with a goal are summarized."""

    name: str
    variants: Mapping[str, Variant]
    goals: Mapping[str, str] = field(default_factory=dict)
    rounds: int | None = None  # replaces the requested number
    in_order: bool = False  # in every turn; otherwise every second turn has the opposite order
    turns: list[dict[str, Measures]] = field(default_factory=list)  # filled by the runner

    def values(self, variant: str, name: str) -> list[float]:
        return [float(turn[variant][name]) for turn in self.turns if variant in turn]

    def ratios(self, variant: str, name: str) -> list[float]:
        first = next(iter(self.variants))
        if name not in self.figures(first):
            return []
        pairs = zip(self.values(variant, name), self.values(first, name), strict=True)
        return [value / base for value, base in pairs if base]

    def figures(self, variant: str) -> list[str]:
        return [name for name, value in self.turns[0][variant].items() if isinstance(value, float | int)]


class Case(ABC):
    """The base class of all cases. A case is a frozen dataclass, and its docstring is its help."""

    rounds: ClassVar[int] = 5
    warm: ClassVar[int] = 0  # number of first turns that do not count

    @abstractmethod
    def groups(self) -> AsyncIterator[Group]:
        """Yields each group while its variants can run. A group has its turns before the generator resumes."""


def argument(what: str, read: Callable[[str], Any] = Path, *, nargs: str | None = None, default: Any = MISSING) -> Any:
    return field(default=default, metadata={"help": what, "type": read, "nargs": nargs})


def option(default: Any, what: str, read: Callable[[str], Any] | None = None) -> Any:
    """Makes a field that is an option. It is a switch if the default is False, and a list if the default is a tuple."""
    read = read or (str if default is None else type(default))
    return field(default=default, metadata={"help": what, "type": read, "option": True})

"""A case of the benchmarks: a dataclass whose fields are options. It yields groups of variants, which take turns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

Measures = Mapping[str, float | str | bytes]
"""Figures, texts and bytes by name. Texts are only shown. Bytes must be equal for all variants of a turn."""
Variant = Callable[[int], Awaitable[Measures]]
"""A function that measures one turn. In turns of the same number, all variants draw the same prompts."""


@dataclass(slots=True)
class Group:
    """Variants, which are compared with the first one. `goals` maps a figure to the goal for its ratio or, if there is
    only one variant, for the figure itself. If there are goals, only figures with a goal are summarized."""

    name: str
    variants: Mapping[str, Variant]
    goals: Mapping[str, str] = field(default_factory=dict)
    rounds: int | None = None  # Replaces the requested number of rounds.
    in_order: bool = False  # If False, every second turn has the opposite order.
    turns: list[dict[str, Measures]] = field(default_factory=list)  # Filled by the runner.

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
    warm: ClassVar[int] = 0  # Number of first turns that do not count.

    @abstractmethod
    def groups(self) -> AsyncIterator[Group]:
        """Yields groups. The runner measures a group before it resumes the generator, which then cleans up."""


def argument(what: str, read: Callable[[str], Any] = Path, *, nargs: str | None = None, default: Any = MISSING) -> Any:
    return field(default=default, metadata={"help": what, "type": read, "nargs": nargs})


def option(default: Any, what: str, read: Callable[[str], Any] | None = None) -> Any:
    """Declares a field that is a command-line option. A default of False makes a switch, and a tuple makes a list."""
    read = read or (str if default is None else type(default))
    return field(default=default, metadata={"help": what, "type": read, "option": True})

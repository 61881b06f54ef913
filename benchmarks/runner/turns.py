"""Runs the variants of each group alternately. Prints the figures of each run, and a summary."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles

from llamaclust.cluster.state.measurements import LoadMeter, OtherLoad
from llamaclust.core.errors import LlamaclustError
from runner.case import Case, Group, Measures

_MANY = 8
"""The minimum number of values for which quartiles are printed."""


@dataclass(slots=True)
class Turns:
    case: Case
    rounds: int | None = None
    json: Path | None = None
    loads: list[OtherLoad] = field(default_factory=list)  # Load of other programs, by turn.
    _columns: tuple[str, ...] = ()
    _width: int = 12

    async def run(self) -> None:
        async with aclosing(self.case.groups()) as groups:  # type: ignore[type-var]
            async for group in groups:
                await self._measure(group)
                self._summary(group)
        if self.loads:
            used = [load.others + load.stolen for load in self.loads]
            cores = self.loads[0].cores
            print(f"other programs used {median(used):.2f} cores, at most {max(used):.2f}, of {cores}")

    async def _measure(self, group: Group) -> None:
        self._width = max(self._width, *map(len, group.variants))
        count = group.rounds or self.rounds or self.case.rounds
        for turn in range(-self.case.warm, count):
            names = [*group.variants]
            with self._watched():
                found = {
                    name: await group.variants[name](turn)
                    for name in (names[::-1] if turn % 2 and not group.in_order else names)
                }
            found = {name: found[name] for name in names}
            check_same(group.name, found)
            if turn >= 0:
                group.turns.append(found)
                for name in names:
                    if len(names) > 1 or count == 1:
                        self._row(group, f"{turn + 1:4}", name, found[name])
                    self._write(group, turn, name, found[name])

    def _row(self, group: Group, turn: str, variant: str, measures: Measures) -> None:
        every = {name: each for found in group.turns[0].values() for name, each in found.items()}
        columns = (group.name, *(name for name, value in every.items() if not isinstance(value, bytes)))
        if columns != self._columns:
            self._columns = columns
            heads = "".join(f"  {name:>9}" for name in columns[1:])
            print(f"{group.name}\n{'turn':4} {'':{self._width}}{heads}".lstrip("\n"), flush=True)
        cells = "".join(f"  {text_of(measures.get(name, '')):>{max(9, len(name))}}" for name in columns[1:])
        print(f"{turn} {variant:{self._width}}{cells}", flush=True)

    def _summary(self, group: Group) -> None:
        first, *others = group.variants
        if len(group.turns) > 1:
            for variant in group.variants:
                middle = {name: median(group.values(variant, name)) for name in group.figures(variant)}
                self._row(group, " mid", variant, {**group.turns[0][variant], **middle})
        for variant in others or [first]:
            for name in group.figures(variant):
                values = group.ratios(variant, name) if others else group.values(variant, name)
                if values and (name in group.goals or (others and not group.goals)):
                    goal = f", goal {group.goals[name]}" if group.goals.get(name) else ""
                    over = f"{variant} / {first}" if others else first
                    print(f"{over}, {name}: {spread(values)}{goal}", flush=True)

    def _write(self, group: Group, turn: int, variant: str, measures: Measures) -> None:
        if self.json is not None:
            with self.json.open("a") as file:
                print(
                    json.dumps({"group": group.name, "variant": variant, "turn": turn, **packed(measures)}), file=file
                )

    @contextmanager
    def _watched(self) -> Iterator[None]:
        meter = LoadMeter()
        yield
        if (load := meter.measure()) is not None:
            self.loads.append(load)


def check_same(name: str, found: Mapping[str, Measures]) -> None:
    (first, base), *others = found.items()
    for variant, measures in others:
        for key, value in measures.items():
            if isinstance(value, bytes) and value != base.get(key):
                raise LlamaclustError(f"{name}: {variant} and {first} differ in {key}".lstrip(": "))


def packed(measures: Measures) -> dict[str, float | str]:
    return {key: f"={value.hex()}" if isinstance(value, bytes) else value for key, value in measures.items()}


def unpacked(measures: Mapping[str, float | str]) -> Measures:
    return {
        key: bytes.fromhex(value[1:]) if isinstance(value, str) and value.startswith("=") else value
        for key, value in measures.items()
    }


def text_of(value: float | str | bytes) -> str:
    if isinstance(value, str | bytes):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.4g}"


def spread(values: list[float]) -> str:
    text = f"{median(values):.3f} ({min(values):.3f} .. {max(values):.3f})"
    if len(values) < _MANY:
        return text
    low, _, high = quantiles(values, n=4, method="inclusive")
    return f"{text}, quartiles {low:.3f} and {high:.3f}"

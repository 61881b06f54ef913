"""The text of CUDA sources for the compiler. A module is one file in src/ with all its includes."""

from __future__ import annotations

import re
from pathlib import Path

SRC = Path(__file__).parent.parent / "src"
INCLUDE = (SRC, SRC.parent.parent / "cpu" / "native")
"""The include folders. The folder of the including source is searched before them."""

OPTIONS = ("--std=c++20", "--fmad=false", "--ftz=false", "--prec-div=true", "--prec-sqrt=true")
"""Options for exact arithmetic: no fused multiply-add, no approximations, and no flushing of subnormals."""

_INCLUDE = re.compile(r'^#include (?:"(.+)"|<.+>)')


def modules() -> dict[str, Path]:
    return {".".join(path.relative_to(SRC).with_suffix("").parts): path for path in sorted(SRC.rglob("*.cu"))}


def whole_text(path: Path, include: tuple[Path, ...] = INCLUDE) -> str:
    """Returns the source with each include inserted once, so that the compilers' caches notice every change."""
    return "".join(_lines(path, include, set()))


def _lines(path: Path, include: tuple[Path, ...], seen: set[Path]) -> list[str]:
    seen.add(path.resolve())
    lines = [f'#line 1 "{path.name}"\n']
    for number, line in enumerate(path.read_text().splitlines(), 1):
        found = _INCLUDE.match(line)
        if line == "#pragma once":
            lines.append("\n")
        elif found is None:
            lines.append(f"{line}\n")
        elif found[1] is None:
            lines += ["#ifndef __CUDACC_RTC__\n", f"{line}\n", "#endif\n", f'#line {number + 1} "{path.name}"\n']
        else:
            lines += _included(found[1], line, path, include, seen)
            lines.append(f'#line {number + 1} "{path.name}"\n')
    return lines


def _included(name: str, line: str, path: Path, include: tuple[Path, ...], seen: set[Path]) -> list[str]:
    places = [folder / name for folder in (path.parent, *include)]
    there = next((place for place in places if place.is_file()), None)
    if there is None:
        return [f"{line}\n"]
    return [] if there.resolve() in seen else _lines(there, include, seen)

"""Lines that benchmarks print."""

from __future__ import annotations

import sys
from statistics import median


def report(what: str) -> None:
    """Prints the next step on standard error."""
    if sys.stderr.isatty():
        print(what, file=sys.stderr, flush=True)


def show(name: str, ratios: list[float], target: str) -> None:
    spread = f"{min(ratios):.3f} .. {max(ratios):.3f}"
    print(f"{name:58} {median(ratios):7.3f}   {spread:18} goal {target}")

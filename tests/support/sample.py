"""A part of the tests."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from math import ceil
from random import Random

import pytest


def sampled(nodes: Iterable[str], one_in: int, seed: int) -> set[str]:
    """Of the cases of each test one in so many, and one at least; the same ones for a seed. UsageError below 1."""
    if one_in < 1:
        raise pytest.UsageError(f"--sample {one_in}: give 1 or more")
    cases: dict[str, list[str]] = defaultdict(list)
    for node in nodes:
        cases[node.partition("[")[0]].append(node)
    return {
        node for name, own in cases.items() for node in Random(f"{seed} {name}").sample(own, ceil(len(own) / one_in))
    }

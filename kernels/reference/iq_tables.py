"""The grids of ggml's IQ types. A grid index stands for four or eight weights, each with one of a few levels."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

_HEADER = Path(__file__).parents[1] / "cpu" / "native" / "pack" / "grid_points.h"
_LEVELS = {
    "IQ2_XXS": (8, 25, 43),
    "IQ2_XS": (8, 25, 43),
    "IQ2_S": (8, 25, 43),
    "IQ3_XXS": (4, 12, 20, 28, 36, 44, 52, 62),
    "IQ3_S": (1, 3, 5, 7, 9, 11, 13, 15),
    "IQ1": (-1, 0, 1),
}


@cache
def grid(name: str) -> NDArray[np.float32]:
    """Returns the grid as float32 [points, dims], unpacked from the text in grid_points.h."""
    levels = _LEVELS[name]
    found = re.search(rf'k{name}Grid = unpack<\d+, {len(levels)}>\((.+?")\);', _HEADER.read_text(), re.DOTALL)
    assert found is not None, name
    # A step is a character's distance from "$", plus 56 for each "~" before it.
    steps = re.findall("(~*)([^~])", "".join(re.findall('"(.*)"', found[1])))
    numbers = np.cumsum([56 * len(far) + ord(near) - ord("$") for far, near in steps])
    digits = numbers[:, None] // len(levels) ** np.arange(8 if len(levels) == 3 else 4) % len(levels)
    points: NDArray[np.float32] = np.array(levels, np.float32)[digits]
    return points

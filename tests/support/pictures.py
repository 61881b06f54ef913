"""Images of 40 sizes, settings of each model family, and samples of preprocessed tiles. Tests and the recorder of
reference values use this module."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from llamaclust.model.images.families.family import Piece
from llamaclust.model.images.settings import ImageSettings
from support.paths import DATA

REFERENCES = DATA / "tiles.json"
SAMPLES = 24
Pixels = NDArray[np.uint8]  # [height, width, 3]

_CHOSEN = (
    (1, 1),
    (2, 1),
    (3, 500),
    (336, 336),
    (448, 448),
    (512, 512),
    (896, 896),
    (1344, 336),
    (640, 480),
    (1920, 1080),
)
_COUNT = 40


def _sizes() -> tuple[tuple[int, int], ...]:
    random = np.random.default_rng(46)
    sizes = list(_CHOSEN)
    while len(sizes) < _COUNT:
        width, height = (int(2 ** random.uniform(2, 11)) for _ in range(2))
        if max(width, height) < 60 * min(width, height) and width * height < 1 << 21:
            sizes.append((width, height))
    return tuple(sizes)


SIZES = _sizes()
"""Pairs (width, height)."""

SETTINGS: Mapping[str, ImageSettings] = MappingProxyType(
    {
        settings.projector: settings
        for settings in (
            ImageSettings("gemma3", 14, 4, image_size=896),
            ImageSettings("gemma4v", 16, 3, max_pixels=280 * 48**2),
            ImageSettings("glm4v", 14, 2, min_pixels=112 * 112 // 2, max_pixels=9633792 // 2),
            ImageSettings("idefics3", 16, 4, image_size=512, longest_edge=2048),
            ImageSettings("internvl", 14, 2, image_size=448, min_tiles=1, max_tiles=12),
            ImageSettings("kimivl", 14, 2, max_pixels=4096 * 14**2),
            ImageSettings("lfm2", 16, 2, 512, min_pixels=64 * 32**2, max_pixels=256 * 32**2, min_tiles=2, max_tiles=10),
            ImageSettings("llama4", 14, 2, image_size=336, max_tiles=16),
            ImageSettings("pixtral", 14, 2, longest_edge=1540),
            ImageSettings("qwen2vl_merger", 14, 2, min_pixels=56 * 56, max_pixels=28 * 28 * 1280),
            ImageSettings("qwen2.5vl_merger", 14, 2, min_pixels=56 * 56, max_pixels=28 * 28 * 16384),
            ImageSettings("qwen3vl_merger", 16, 2, min_pixels=1 << 16, max_pixels=1 << 24),
        )
    }
)


def picture(number: int) -> Pixels:
    """Draws waves, an edge and noise, so that different filters give different results."""
    width, height = SIZES[number]
    random = np.random.default_rng(number)
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    phases, steps = random.uniform(0, 6, 3), random.uniform(0.01, 1.5, (3, 2))
    waves = np.stack([np.sin(steps[c, 0] * x + steps[c, 1] * y + phases[c]) for c in range(3)], axis=-1)
    edge = (x * height > y * width)[..., None]
    noise = random.uniform(-1, 1, (height, width, 3))
    drawn: Pixels = np.clip(128 + 70 * waves + 30 * edge + 40 * noise, 0, 255).astype(np.uint8)
    return drawn


def samples_of(tiles: Sequence[Pixels], number: int) -> NDArray[np.uint8]:
    """Returns pixels [SAMPLES, 3] at random positions, and at two corners of the last tile."""
    random = np.random.default_rng(1000 + number)
    places = [(int(random.integers(len(tiles))), *random.uniform(0, 1, 2)) for _ in range(SAMPLES - 2)]
    places += [(len(tiles) - 1, 0.0, 0.0), (len(tiles) - 1, 0.9999, 0.9999)]
    return np.stack([tiles[t][int(y * tiles[t].shape[0]), int(x * tiles[t].shape[1])] for t, y, x in places])


def shown(prompt: Iterable[Piece]) -> str:
    """Returns the prompt's text with `[n]` in place of n image rows."""
    return "".join(piece if isinstance(piece, str) else f"[{piece.end - piece.start}]" for piece in prompt)


def sizes_of(tiles: Sequence[Pixels]) -> list[tuple[int, int]]:
    return [(tile.shape[1], tile.shape[0]) for tile in tiles]


def runs(sizes: Sequence[tuple[int, int]]) -> list[list[int]]:
    """Returns [width, height, count] for each run of equal sizes."""
    return [[*size, len([*equal])] for size, equal in groupby(sizes)]

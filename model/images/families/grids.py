"""Grids of tiles, as (columns, rows)."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING

from llamaclust.model.images.families.family import Size
from llamaclust.model.images.settings import ImageSettings

if TYPE_CHECKING:
    from llamaclust.model.projectors.keys import ImageNumbers


def tiled(settings: ImageSettings, numbers: ImageNumbers, side: int, tiles: tuple[int, int]) -> ImageSettings:
    """Returns the settings with tiles of side `side`. `tiles` limits their number if the file does not."""
    least, most = numbers.min_tiles or tiles[0], numbers.max_tiles or tiles[1]
    return replace(settings, image_size=side, min_tiles=min(least, most), max_tiles=most)


def closest_grid(size: Size, settings: ImageSettings) -> tuple[int, int]:
    """Returns the grid of tiles whose aspect ratio is closest to the image's."""
    width, height = size
    aspect, best, least = width / height, (1, 1), float("inf")
    for columns, rows in grids(settings.min_tiles, settings.max_tiles):
        difference = abs(aspect - columns / rows)
        is_filled = width * height > 0.5 * settings.image_size**2 * columns * rows
        if difference < least or (difference == least and is_filled):
            least, best = difference, (columns, rows)
    return best


def grids(least: int, most: int) -> list[tuple[int, int]]:
    numbers = range(1, most + 1)
    return sorted((grid for grid in product(numbers, numbers) if least <= area(grid) <= most), key=area)


def area(size: tuple[int, int]) -> int:
    return size[0] * size[1]

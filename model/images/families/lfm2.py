from __future__ import annotations

from collections.abc import Iterator
from math import isqrt
from typing import TYPE_CHECKING

from llamaclust.model.images.families.family import Cut, Filter, Grid, ImageFamily, Piece, Size, free
from llamaclust.model.images.families.grids import closest_grid, tiled
from llamaclust.model.images.families.rounding import within
from llamaclust.model.images.settings import ImageSettings

if TYPE_CHECKING:
    from llamaclust.model.projectors.keys import ImageNumbers

_TILES = (2, 10)
_TILE = 512
_TOLERANCE = 2.0
"""An image is cut into tiles if it has more than `max_pixels` times this factor."""


def _complete(settings: ImageSettings, numbers: ImageNumbers) -> ImageSettings:
    """Sets the side of tiles, which files do not state, so that a tile has at most `max_pixels` pixels."""
    side = isqrt(numbers.max_pixels) // settings.side * settings.side
    return tiled(free(settings, numbers), numbers, min(side, _TILE), _TILES)


def _cut(size: Size, settings: ImageSettings) -> Cut:
    overview = _resized(size, settings)
    if not _is_cut(size, settings):
        return Cut(Filter.BILINEAR, (overview,))
    tile = settings.image_size
    columns, rows = closest_grid(size, settings)
    return Cut(Filter.BILINEAR, ((columns * tile, rows * tile),), tile=tile, overview=overview)


def _resized(size: Size, settings: ImageSettings) -> Size:
    side = settings.side
    width, height = (max(side, round(length / side) * side) for length in size)
    return within(size, (width, height), settings)


def _is_cut(size: Size, settings: ImageSettings) -> bool:
    width, height = (max(settings.patch_size, round(length / settings.side) * settings.side) for length in size)
    return settings.max_tiles > 1 and width * height > settings.max_pixels * _TOLERANCE


def _layout(grid: Grid) -> Iterator[Piece]:
    yield "<|image_start|>"
    for row, column in grid.cells():
        yield f"<|img_row_{row + 1}_col_{column + 1}|>"
        yield grid.of(row * grid.columns + column)
    if grid.columns:
        yield "<|img_thumbnail|>"
    yield grid.overview
    yield "<|image_end|>"


LFM2 = ImageFamily(_complete, _cut, _layout)

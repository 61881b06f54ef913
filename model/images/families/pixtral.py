from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import floor
from typing import TYPE_CHECKING

from llamaclust.model.images.families.family import Filter, Grid, ImageFamily, Piece, Size, TileRows, whole
from llamaclust.model.images.families.rounding import up
from llamaclust.model.images.settings import ImageSettings

if TYPE_CHECKING:
    from llamaclust.model.projectors.keys import ImageNumbers


def _complete(settings: ImageSettings, numbers: ImageNumbers) -> ImageSettings:
    """Limits the longest edge to the file's image size, because the encoder has no RoPE for larger images."""
    return replace(settings, longest_edge=min(numbers.longest_edge or numbers.image_size, numbers.image_size))


def _resized(size: Size, settings: ImageSettings) -> Size:
    width, height = size
    ratio = max(height / settings.longest_edge, width / settings.longest_edge)
    if ratio > 1:
        width, height = floor(width / ratio), floor(height / ratio)
    return up(max(width, 1), settings.side), up(max(height, 1), settings.side)


def _layout(grid: Grid) -> Iterator[Piece]:
    columns, lines = grid.tiles[0]
    for line in range(lines):
        yield TileRows(0, line * columns, (line + 1) * columns)
        yield "[IMG_BREAK]" if line + 1 < lines else "[IMG_END]"


PIXTRAL = ImageFamily(_complete, whole(_resized, Filter.BICUBIC), _layout)

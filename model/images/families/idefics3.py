from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from llamaclust.model.images.families.family import Cut, Filter, Grid, ImageFamily, Piece, Size
from llamaclust.model.images.families.rounding import up
from llamaclust.model.images.settings import ImageSettings

if TYPE_CHECKING:
    from llamaclust.model.projectors.keys import ImageNumbers

_TILES_A_SIDE = 4
_MAX_EDGE = 4096
"""The maximum edge in pixels to which transformers resizes."""
_FAKE = "<fake_token_around_image>"


def _complete(settings: ImageSettings, numbers: ImageNumbers) -> ImageSettings:
    longest = numbers.longest_edge or _TILES_A_SIDE * numbers.image_size
    return replace(settings, image_size=numbers.image_size, longest_edge=longest)


def _cut(size: Size, settings: ImageSettings) -> Cut:
    tile, resized = settings.image_size, _resized(size, settings)
    canvas = _in_tiles(resized, tile)
    if max(canvas) <= tile:
        return Cut(Filter.LANCZOS, (resized, canvas))
    return Cut(Filter.LANCZOS, (resized, canvas), tile=tile, overview=(tile, tile), of_result=True)


def _resized(size: Size, settings: ImageSettings) -> Size:
    width, height = size
    longest, aspect = min(settings.longest_edge, _MAX_EDGE), width / height
    if width >= height:
        return longest, max(_even(int(longest / aspect)), 1)
    return max(_even(int(longest * aspect)), 1), longest


def _in_tiles(size: Size, tile: int) -> Size:
    width, height = size
    aspect = width / height
    if width >= height:
        width = up(width, tile)
        return width, max(up(int(width / aspect), tile), tile)
    height = up(height, tile)
    return max(up(int(height * aspect), tile), tile), height


def _even(length: int) -> int:
    return length + length % 2


def _layout(grid: Grid) -> Iterator[Piece]:
    for row, column in grid.cells():
        yield f"{_FAKE}<row_{row + 1}_col_{column + 1}>"
        yield grid.of(row * grid.columns + column)
        if column + 1 == grid.columns:
            yield "\n"
    if grid.columns:
        yield "\n"
    yield f"{_FAKE}<global-img>"
    yield grid.overview
    yield _FAKE


IDEFICS3 = ImageFamily(_complete, _cut, _layout)

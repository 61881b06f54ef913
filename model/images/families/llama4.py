from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import floor
from struct import pack, unpack
from typing import TYPE_CHECKING

from llamaclust.model.images.families.family import Cut, Filter, Grid, ImageFamily, Piece, Size
from llamaclust.model.images.families.grids import area, grids
from llamaclust.model.images.settings import ImageSettings

if TYPE_CHECKING:
    from llamaclust.model.projectors.keys import ImageNumbers

_TILES = 16
"""The tile limit of transformers. llama.cpp's limit is 9."""


def _complete(settings: ImageSettings, numbers: ImageNumbers) -> ImageSettings:
    return replace(settings, image_size=numbers.image_size, max_tiles=numbers.max_tiles or _TILES)


def _cut(size: Size, settings: ImageSettings) -> Cut:
    tile = settings.image_size
    columns, rows = _grid(size, tile, settings.max_tiles)
    canvas = columns * tile, rows * tile
    resizes = (_resized(size, canvas, tile),)
    if columns * rows == 1:
        return Cut(Filter.BILINEAR, resizes, canvas)
    return Cut(Filter.BILINEAR, resizes, canvas, tile, overview=(tile, tile))


def _grid(size: Size, tile: int, most: int) -> tuple[int, int]:
    """Returns the grid that enlarges the image least or, if all grids shrink it, the grid that shrinks it least."""
    every = grids(1, most)
    scales = {grid: min(_single(grid[0] * tile / size[0]), _single(grid[1] * tile / size[1])) for grid in every}
    larger = [scale for scale in scales.values() if scale >= 1]
    chosen = min(larger) if larger else max(scales.values())
    return min((grid for grid in every if scales[grid] == chosen), key=area)


def _resized(size: Size, canvas: Size, tile: int) -> Size:
    """Returns the size of the image in the canvas. An enlarged side has at most `tile` pixels."""
    targets = [min(max(length, tile), most) for length, most in zip(size, canvas, strict=True)]
    are_single = [most < max(length, tile) for length, most in zip(size, canvas, strict=True)]
    wide, tall = (
        _single(target / length) if single else target / length
        for target, length, single in zip(targets, size, are_single, strict=True)
    )
    is_single = any(are_single)
    if (_single(wide) < _single(tall)) if is_single else (wide < tall):
        return targets[0], max(min(floor(_scaled(size[1], wide, are_single[0])), targets[1]), 1)
    return max(min(floor(_scaled(size[0], tall, are_single[1])), targets[0]), 1), targets[1]


def _scaled(length: int, scale: float, is_single: bool) -> float:
    return _single(length * scale) if is_single else length * scale


def _single(value: float) -> float:
    rounded: float = unpack("<f", pack("<f", value))[0]
    return rounded


def _layout(grid: Grid) -> Iterator[Piece]:
    yield "<|image_start|>"
    for row, column in grid.cells():
        yield grid.of(row * grid.columns + column)
        yield "<|tile_x_separator|>" if column + 1 < grid.columns else "<|tile_y_separator|>"
    yield "<|image|>"
    yield grid.overview
    yield "<|image_end|>"


LLAMA4 = ImageFamily(_complete, _cut, _layout)

"""Resizes an image and cuts it into tiles. The filters are Pillow's, as in transformers. llama.cpp has simpler filters,
and pads images of some families instead of stretching them. Only child processes import this module."""

from __future__ import annotations

from dataclasses import dataclass

from PIL.Image import Image, Resampling, new

from llamaclust.model.images.families import FAMILIES
from llamaclust.model.images.settings import ImageSettings


@dataclass(frozen=True, slots=True)
class Tiling:
    """The tiles of an image, row by row. If there are several tiles, the last tile is the overview. `columns` and
    `rows` are 0 if the image was not cut."""

    tiles: tuple[Image, ...]
    columns: int = 0
    rows: int = 0


def tiling_of(image: Image, settings: ImageSettings) -> Tiling:
    cut = FAMILIES[settings.projector].cut(image.size, settings)
    resampling = Resampling[cut.filter.value]
    result = image
    for size in cut.resizes:
        result = result.resize(size, resampling)
    if cut.canvas is not None:
        result = _on_black(result, cut.canvas)
    tiles = _tiles(result, cut.tile) if cut.tile else [result]
    if cut.overview is not None:
        tiles.append((result if cut.of_result else image).resize(cut.overview, resampling))
    if not cut.tile:
        return Tiling((*tiles,))
    return Tiling((*tiles,), result.width // cut.tile, result.height // cut.tile)


def _on_black(image: Image, size: tuple[int, int]) -> Image:
    canvas = new("RGB", size)
    canvas.paste(image, (0, 0))
    return canvas


def _tiles(image: Image, side: int) -> list[Image]:
    corners = ((x, y) for y in range(0, image.height, side) for x in range(0, image.width, side))
    return [image.crop((x, y, x + side, y + side)) for x, y in corners]

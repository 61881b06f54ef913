"""The rules by which an encoder family prepares an image: sizes, tiles, and the text in the prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING

from llamaclust.model.images.settings import ImageSettings

if TYPE_CHECKING:
    from llamaclust.model.projectors.keys import ImageNumbers

Size = tuple[int, int]
"""(width, height) in pixels."""


class Filter(Enum):
    BILINEAR = "BILINEAR"
    BICUBIC = "BICUBIC"
    LANCZOS = "LANCZOS"


@dataclass(frozen=True, slots=True)
class Cut:
    """The tiles of an image.

    resizes: sizes to which the image is resized, one after the other.
    canvas: the size of a black canvas. The resized image is put into its upper left corner.
    tile: the side of the tiles into which the result is cut, line by line. If 0, the result is the only tile.
    overview: the size of one more tile with the whole image. It is resized from the result if `of_result`."""

    filter: Filter
    resizes: Sequence[Size]
    canvas: Size | None = None
    tile: int = 0
    overview: Size | None = None
    of_result: bool = False


@dataclass(frozen=True, slots=True)
class TileRows:
    """The rows [start, end) of the encoder's result for a tile. Rows are in the order of the tile's lines."""

    tile: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Grid:
    """The grid of an image. `tiles` has the columns and lines of each tile, counted in rows of the encoder's result.
    `columns` and `rows` count tiles. They are 0 if the image is not cut."""

    tiles: Sequence[tuple[int, int]]
    columns: int
    rows: int

    def of(self, tile: int) -> TileRows:
        columns, lines = self.tiles[tile]
        return TileRows(tile, 0, columns * lines)

    @property
    def overview(self) -> TileRows:
        return self.of(len(self.tiles) - 1)

    def cells(self) -> Iterator[tuple[int, int]]:
        for row in range(self.rows):
            for column in range(self.columns):
                yield row, column


Piece = str | TileRows
"""Rows, or a text in which special tokens are written as text."""
Complete = Callable[[ImageSettings, "ImageNumbers"], ImageSettings]
CutRule = Callable[[Size, ImageSettings], Cut]
Layout = Callable[[Grid], Iterator[Piece]]


@dataclass(frozen=True, slots=True)
class ImageFamily:
    """The rules of an encoder family.

    complete: adds numbers to settings, from the projector's file or the family's defaults.
    cut: returns the tiles of an image of a given size. Raises ImageError if the family does not support its shape.
    layout: yields the text and the rows of an image in a prompt."""

    complete: Complete
    cut: CutRule
    layout: Layout


def fixed(settings: ImageSettings, numbers: ImageNumbers) -> ImageSettings:
    return replace(settings, image_size=numbers.image_size)


def free(settings: ImageSettings, numbers: ImageNumbers) -> ImageSettings:
    return replace(settings, min_pixels=numbers.min_pixels, max_pixels=numbers.max_pixels)


def whole(rule: Callable[[Size, ImageSettings], Size], kind: Filter) -> CutRule:

    def cut(size: Size, settings: ImageSettings) -> Cut:
        return Cut(kind, (rule(size, settings),))

    return cut


def between(start: str, end: str) -> Layout:

    def layout(grid: Grid) -> Iterator[Piece]:
        yield start
        yield from map(grid.of, range(len(grid.tiles)))
        yield end

    return layout

"""The rules by which a family of encoders prepares an image: sizes, tiles and the text of its prompt."""

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
    """The filter of a resize, by Pillow's name."""

    BILINEAR = "BILINEAR"
    BICUBIC = "BICUBIC"
    LANCZOS = "LANCZOS"


@dataclass(frozen=True, slots=True)
class Cut:
    """The tiles of an image.

    resizes: sizes to which the image is resized, one after the other.
    canvas: size of a black canvas, in whose upper left corner the resized image lies.
    tile: side of the tiles into which the result is cut line by line; 0: the result is the only tile.
    overview: size of one more tile, which is the whole image; with `of_result` it is resized from the result."""

    filter: Filter
    resizes: Sequence[Size]
    canvas: Size | None = None
    tile: int = 0
    overview: Size | None = None
    of_result: bool = False


@dataclass(frozen=True, slots=True)
class TileRows:
    """The rows [start, end) of the encoder's result for a tile, line by line of the tile."""

    tile: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Grid:
    """The rows a side (columns, lines) of each tile, and the columns and rows of tiles, 0 for an image left whole."""

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
        """Yields the row and column of each tile but the overview."""
        for row in range(self.rows):
            for column in range(self.columns):
                yield row, column


Piece = str | TileRows
"""A text, in which special tokens are written as text, or rows."""
Complete = Callable[[ImageSettings, "ImageNumbers"], ImageSettings]
CutRule = Callable[[Size, ImageSettings], Cut]
Layout = Callable[[Grid], Iterator[Piece]]


@dataclass(frozen=True, slots=True)
class ImageFamily:
    """complete: adds the family's numbers, of the projector's file or their defaults, to its settings.
    cut: gives the tiles of an image of a size; raises ImageError for a shape that the family does not take.
    layout: yields the text and the rows of an image in a prompt."""

    complete: Complete
    cut: CutRule
    layout: Layout


def fixed(settings: ImageSettings, numbers: ImageNumbers) -> ImageSettings:
    return replace(settings, image_size=numbers.image_size)


def free(settings: ImageSettings, numbers: ImageNumbers) -> ImageSettings:
    return replace(settings, min_pixels=numbers.min_pixels, max_pixels=numbers.max_pixels)


def whole(rule: Callable[[Size, ImageSettings], Size], kind: Filter) -> CutRule:
    """Returns the rule of a family with one tile of the size that `rule` gives."""

    def cut(size: Size, settings: ImageSettings) -> Cut:
        return Cut(kind, (rule(size, settings),))

    return cut


def between(start: str, end: str) -> Layout:
    """Returns the layout of all tiles between two texts."""

    def layout(grid: Grid) -> Iterator[Piece]:
        yield start
        yield from map(grid.of, range(len(grid.tiles)))
        yield end

    return layout

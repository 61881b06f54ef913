"""The rules by which a family of encoders prepares an image: sizes, tiles, and the text in the prompt."""

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
    """Describes how an image becomes tiles, which are the images that the encoder reads one by one.

    resizes: sizes to which the image is resized, one after the other.
    canvas: the size of a black canvas. The resized image is put into its upper left corner.
    tile: the side in pixels of the tiles into which the resized image is cut. 0 means that it is not cut.
    overview: the size of one more tile, which shows the whole image. If `of_result`, the overview is made from the
        resized image instead of the original."""

    filter: Filter
    resizes: Sequence[Size]
    canvas: Size | None = None
    tile: int = 0
    overview: Size | None = None
    of_result: bool = False


@dataclass(frozen=True, slots=True)
class TileRows:
    """A range of the embeddings of tile number `tile`, in row-major order."""

    tile: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Grid:
    """The grid of tiles into which an image was cut. `columns` and `rows` are numbers of tiles, or 0 if the image is
    not cut. `tiles` has the numbers of columns and rows of each tile's embeddings."""

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
"""A part of an image's prompt: embeddings of a tile, or text, which may contain special tokens such as "<image>"."""
Complete = Callable[[ImageSettings, "ImageNumbers"], ImageSettings]
CutRule = Callable[[Size, ImageSettings], Cut]
Layout = Callable[[Grid], Iterator[Piece]]


@dataclass(frozen=True, slots=True)
class ImageFamily:
    """The rules of an encoder family.

    complete: adds the family's numbers to settings. The numbers come from the projector's file or are defaults.
    cut: returns the tiles of an image of a given size. Raises ImageError if the family does not support the shape.
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

"""The text around the rows of an image in a prompt. It is llama.cpp's: GGUF files are used with its prompts. The
processors of transformers have the same text, but for Gemma 3 (two line ends before and after the image) and Kimi-VL
(a file name after the start)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from llamaclust.model.images.settings import ImageSettings


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


Piece = str | TileRows
"""A text, in which special tokens are written as text, or rows."""
Layout = Callable[[Grid], Iterator[Piece]]


def prompt_of(settings: ImageSettings, sizes: Sequence[tuple[int, int]], columns: int, rows: int) -> tuple[Piece, ...]:
    """Returns the pieces of an image whose tiles have these sizes (width, height) in pixels. No text is empty, or
    follows another one."""
    side = settings.side
    grid = Grid([(width // side, height // side) for width, height in sizes], columns, rows)
    pieces: list[Piece] = []
    for piece in _LAYOUTS[settings.projector](grid):
        if isinstance(piece, str) and pieces and isinstance(pieces[-1], str):
            pieces[-1] += piece
        else:
            pieces.append(piece)
    return tuple(pieces)


def _between(start: str, end: str) -> Layout:
    def layout(grid: Grid) -> Iterator[Piece]:
        yield start
        yield from map(grid.of, range(len(grid.tiles)))
        yield end

    return layout


def _pixtral(grid: Grid) -> Iterator[Piece]:
    columns, lines = grid.tiles[0]
    for line in range(lines):
        yield TileRows(0, line * columns, (line + 1) * columns)
        yield "[IMG_BREAK]" if line + 1 < lines else "[IMG_END]"


def _idefics3(grid: Grid) -> Iterator[Piece]:
    fake = "<fake_token_around_image>"
    for row, column in _cells(grid):
        yield f"{fake}<row_{row + 1}_col_{column + 1}>"
        yield grid.of(row * grid.columns + column)
        if column + 1 == grid.columns:
            yield "\n"
    if grid.columns:
        yield "\n"
    yield f"{fake}<global-img>"
    yield grid.overview
    yield fake


def _lfm2(grid: Grid) -> Iterator[Piece]:
    yield "<|image_start|>"
    for row, column in _cells(grid):
        yield f"<|img_row_{row + 1}_col_{column + 1}|>"
        yield grid.of(row * grid.columns + column)
    if grid.columns:
        yield "<|img_thumbnail|>"
    yield grid.overview
    yield "<|image_end|>"


def _llama4(grid: Grid) -> Iterator[Piece]:
    yield "<|image_start|>"
    for row, column in _cells(grid):
        yield grid.of(row * grid.columns + column)
        yield "<|tile_x_separator|>" if column + 1 < grid.columns else "<|tile_y_separator|>"
    yield "<|image|>"
    yield grid.overview
    yield "<|image_end|>"


def _cells(grid: Grid) -> Iterator[tuple[int, int]]:
    for row in range(grid.rows):
        for column in range(grid.columns):
            yield row, column


_QWEN = _between("<|vision_start|>", "<|vision_end|>")
_LAYOUTS: Mapping[str, Layout] = MappingProxyType(
    {
        "gemma3": _between("<start_of_image>", "<end_of_image>"),
        "gemma4v": _between("<|image>", "<image|>"),
        "glm4v": _between("<|begin_of_image|>", "<|end_of_image|>"),
        "idefics3": _idefics3,
        "internvl": _between("<img>", "</img>"),
        "kimivl": _between("<|media_start|>", "<|media_end|>"),
        "lfm2": _lfm2,
        "llama4": _llama4,
        "pixtral": _pixtral,
        "qwen2vl_merger": _QWEN,
        "qwen2.5vl_merger": _QWEN,
        "qwen3vl_merger": _QWEN,
    }
)
"""Families by the type of their projector."""

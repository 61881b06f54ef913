"""The text around an image's rows in a prompt. It is llama.cpp's text, because GGUF files are used with this text.
transformers differs for Gemma 3 (two line breaks around the image) and for Kimi-VL (a file name after the start)."""

from __future__ import annotations

from collections.abc import Sequence

from llamaclust.model.images.families import FAMILIES
from llamaclust.model.images.families.family import Grid, Piece
from llamaclust.model.images.settings import ImageSettings


def prompt_of(settings: ImageSettings, sizes: Sequence[tuple[int, int]], columns: int, rows: int) -> tuple[Piece, ...]:
    """Returns an image's texts and embedding rows in the prompt. `sizes` has each tile's (width, height) in pixels."""
    side = settings.side
    grid = Grid([(width // side, height // side) for width, height in sizes], columns, rows)
    pieces: list[Piece] = []
    for piece in FAMILIES[settings.projector].layout(grid):
        if isinstance(piece, str) and pieces and isinstance(pieces[-1], str):
            pieces[-1] += piece
        else:
            pieces.append(piece)
    return tuple(pieces)

"""Resizes and cuts an image into the tiles of a family of encoders. Filters are those of the image processors of
transformers, which compute as Pillow does; llama.cpp has simpler filters, and for some families pads instead of
stretching. Only child processes import this module."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from PIL.Image import Image, Resampling, new

from llamaclust.model.images import sizes
from llamaclust.model.images.settings import ImageSettings

SizeRule = Callable[[sizes.Size, ImageSettings], sizes.Size]


@dataclass(frozen=True, slots=True)
class Tiling:
    """The tiles of an image, line by line; with more than one, the last is the overview. `columns` and `rows` are 0 if
    the image was not cut."""

    tiles: tuple[Image, ...]
    columns: int = 0
    rows: int = 0


def tiling_of(image: Image, settings: ImageSettings) -> Tiling:
    """Raises ImageError for an image of a shape that the family does not take. `image` is RGB."""
    return _CUTTERS[settings.projector](image, settings)


def _whole(rule: SizeRule, resampling: Resampling) -> Callable[[Image, ImageSettings], Tiling]:
    def cut(image: Image, settings: ImageSettings) -> Tiling:
        return Tiling((image.resize(rule(image.size, settings), resampling),))

    return cut


def _square(_: sizes.Size, settings: ImageSettings) -> sizes.Size:
    return settings.image_size, settings.image_size


def _idefics3(image: Image, settings: ImageSettings) -> Tiling:
    resized = image.resize(sizes.idefics3_resized(image.size, settings), Resampling.LANCZOS)
    canvas = resized.resize(sizes.idefics3_canvas(resized.size, settings), Resampling.LANCZOS)
    tile = settings.image_size
    if max(canvas.size) <= tile:
        return Tiling((canvas,))
    overview = canvas.resize((tile, tile), Resampling.LANCZOS)
    return _cut(canvas, tile, overview)


def _internvl(image: Image, settings: ImageSettings) -> Tiling:
    tile = settings.image_size
    columns, rows = sizes.closest_grid(image.size, settings)
    canvas = image.resize((columns * tile, rows * tile), Resampling.BICUBIC)
    if columns * rows == 1:
        return Tiling((canvas,))
    return _cut(canvas, tile, image.resize((tile, tile), Resampling.BICUBIC))


def _lfm2(image: Image, settings: ImageSettings) -> Tiling:
    overview = image.resize(sizes.lfm2_resized(image.size, settings), Resampling.BILINEAR)
    if not sizes.is_cut_by_lfm2(image.size, settings):
        return Tiling((overview,))
    tile = settings.image_size
    columns, rows = sizes.closest_grid(image.size, settings)
    return _cut(image.resize((columns * tile, rows * tile), Resampling.BILINEAR), tile, overview)


def _llama4(image: Image, settings: ImageSettings) -> Tiling:
    tile, fit = settings.image_size, sizes.llama4_canvas(image.size, settings)
    resized = image.resize(fit.image, Resampling.BILINEAR)
    canvas = _on_black(resized, (fit.columns * tile, fit.rows * tile))
    if fit.columns * fit.rows == 1:
        return Tiling((canvas,))
    return _cut(canvas, tile, image.resize((tile, tile), Resampling.BILINEAR))


def _kimi(image: Image, settings: ImageSettings) -> Tiling:
    resized = image.resize(sizes.kimi_resized(image.size, settings), Resampling.BICUBIC)
    return Tiling((_on_black(resized, sizes.padded(resized.size, settings)),))


def _on_black(image: Image, size: sizes.Size) -> Image:
    canvas = new("RGB", size)
    canvas.paste(image, (0, 0))
    return canvas


def _cut(canvas: Image, tile: int, overview: Image) -> Tiling:
    columns, rows = canvas.width // tile, canvas.height // tile
    corners = ((x * tile, y * tile) for y in range(rows) for x in range(columns))
    tiles = [canvas.crop((x, y, x + tile, y + tile)) for x, y in corners]
    return Tiling((*tiles, overview), columns, rows)


_QWEN: Final = _whole(sizes.smart_resized, Resampling.BICUBIC)
_CUTTERS: Mapping[str, Callable[[Image, ImageSettings], Tiling]] = MappingProxyType(
    {
        "gemma3": _whole(_square, Resampling.BILINEAR),
        "gemma4v": _whole(sizes.gemma4_resized, Resampling.BICUBIC),
        "glm4v": _whole(sizes.glm_resized, Resampling.BICUBIC),
        "idefics3": _idefics3,
        "internvl": _internvl,
        "kimivl": _kimi,
        "lfm2": _lfm2,
        "llama4": _llama4,
        "pixtral": _whole(sizes.pixtral_resized, Resampling.BICUBIC),
        "qwen2vl_merger": _QWEN,
        "qwen2.5vl_merger": _QWEN,
        "qwen3vl_merger": _QWEN,
    }
)
"""Families by the type of their projector."""

"""The settings by which images are prepared for a projector."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from math import isqrt
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from llamaclust.model.images.settings import ImageSettings

if TYPE_CHECKING:
    from llamaclust.model.projectors.keys import ImageNumbers
    from llamaclust.model.projectors.projector import Projector

_IDEFICS3_TILES_A_SIDE: Final = 4
_INTERNVL_TILES: Final = (1, 12)
_LFM2_TILES: Final = (2, 10)
_LFM2_TILE: Final = 512
_LLAMA4_TILES: Final = 16
_LOW_SIDE: Final = 512


def settings_of(projector: Projector) -> ImageSettings:
    """Returns a projector's settings. Numbers that its file lacks are those of llama.cpp's `clip.cpp`, except Llama 4's
    16 tiles, which are transformers' (llama.cpp takes 9)."""
    numbers = projector.images
    basic = ImageSettings(projector.name, projector.patch_size, projector.merge)
    return _ADDED[projector.name](basic, numbers)


def low_detail(settings: ImageSettings) -> ImageSettings:
    """Returns the settings for OpenAI's `detail: low`. An image is not cut into tiles. If its size is free, it has at
    most the pixels of 512 x 512."""
    most = max(_LOW_SIDE // settings.side, 1) ** 2 * settings.side**2
    least_pixels, most_pixels = min(settings.min_pixels, most), min(settings.max_pixels, most)
    lowered = replace(settings, min_pixels=least_pixels, max_pixels=most_pixels)
    match settings.projector:
        case "idefics3":
            return replace(lowered, longest_edge=settings.image_size)
        case "pixtral":
            return replace(lowered, longest_edge=min(settings.longest_edge, _LOW_SIDE))
    return replace(lowered, min_tiles=min(settings.min_tiles, 1), max_tiles=min(settings.max_tiles, 1))


def _fixed(settings: ImageSettings, numbers: ImageNumbers) -> ImageSettings:
    return replace(settings, image_size=numbers.image_size)


def _free(settings: ImageSettings, numbers: ImageNumbers) -> ImageSettings:
    return replace(settings, min_pixels=numbers.min_pixels, max_pixels=numbers.max_pixels)


def _idefics3(settings: ImageSettings, numbers: ImageNumbers) -> ImageSettings:
    longest = numbers.longest_edge or _IDEFICS3_TILES_A_SIDE * numbers.image_size
    return replace(settings, image_size=numbers.image_size, longest_edge=longest)


def _internvl(settings: ImageSettings, numbers: ImageNumbers) -> ImageSettings:
    return _tiled(settings, numbers, numbers.image_size, _INTERNVL_TILES)


def _lfm2(settings: ImageSettings, numbers: ImageNumbers) -> ImageSettings:
    """Files do not tell the side of a tile. Its pixels are at most those of an image that is not cut."""
    side = isqrt(numbers.max_pixels) // settings.side * settings.side
    return _tiled(_free(settings, numbers), numbers, min(side, _LFM2_TILE), _LFM2_TILES)


def _tiled(settings: ImageSettings, numbers: ImageNumbers, side: int, tiles: tuple[int, int]) -> ImageSettings:
    least, most = numbers.min_tiles or tiles[0], numbers.max_tiles or tiles[1]
    return replace(settings, image_size=side, min_tiles=min(least, most), max_tiles=most)


def _llama4(settings: ImageSettings, numbers: ImageNumbers) -> ImageSettings:
    return replace(settings, image_size=numbers.image_size, max_tiles=numbers.max_tiles or _LLAMA4_TILES)


def _pixtral(settings: ImageSettings, numbers: ImageNumbers) -> ImageSettings:
    """The rotations of patches are known up to the image size."""
    return replace(settings, longest_edge=min(numbers.longest_edge or numbers.image_size, numbers.image_size))


_ADDED: Mapping[str, Callable[[ImageSettings, ImageNumbers], ImageSettings]] = MappingProxyType(
    {
        "gemma3": _fixed,
        "gemma4v": _free,
        "glm4v": _free,
        "idefics3": _idefics3,
        "internvl": _internvl,
        "kimivl": _free,
        "lfm2": _lfm2,
        "llama4": _llama4,
        "pixtral": _pixtral,
        "qwen2.5vl_merger": _free,
        "qwen3vl_merger": _free,
    }
)
"""Families by the type of their projector."""

"""The sizes to which families of encoders resize an image. The rules are those of the image processors of transformers
5.24, operation by operation, so that a size never differs by a rounding. Sizes are (width, height) in pixels."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from math import ceil, floor, sqrt
from struct import pack, unpack

from llamaclust.model.images.settings import ImageError, ImageSettings

Size = tuple[int, int]

_MAX_ASPECT = 200
_MAX_EDGE = 4096
"""The longest edge to which Idefics 3 ever resizes."""
_MAX_POSITIONS = 512
"""The positions a side for which Kimi-VL has rotations."""
_TOLERANCE = 2.0
"""LFM2-VL cuts an image only if it has this many times the pixels of a tile of free size."""


def smart_resized(size: Size, settings: ImageSettings) -> Size:
    """Qwen-VL: multiples of a row's side, with about the image's aspect, and pixels between the limits."""
    width, height = size
    if max(size) / min(size) > _MAX_ASPECT:
        what = f"the longer side is more than {_MAX_ASPECT} times the shorter one"
        raise ImageError(f"it has {width} x {height} pixels: {what}; send a part of the image")
    side = settings.side
    rounded = (round(width / side) * side, round(height / side) * side)
    return _within(size, rounded, settings)


def glm_resized(size: Size, settings: ImageSettings) -> Size:
    """GLM-4V enlarges images smaller than the square of one row, then resizes them as Qwen-VL does."""
    width, height = size
    side = settings.side
    if min(size) < side:
        scale = max(side / height, side / width)
        width, height = int(width * scale), int(height * scale)
    return smart_resized((width, height), settings)


def lfm2_resized(size: Size, settings: ImageSettings) -> Size:
    """LFM2-VL: as Qwen-VL, with a row a side at least, for any aspect."""
    side = settings.side
    width, height = (max(side, round(length / side) * side) for length in size)
    return _within(size, (width, height), settings)


def _within(size: Size, rounded: Size, settings: ImageSettings) -> Size:
    width, height = size
    side = settings.side
    if rounded[0] * rounded[1] > settings.max_pixels:
        beta = sqrt((height * width) / settings.max_pixels)
        return max(side, floor(width / beta / side) * side), max(side, floor(height / beta / side) * side)
    if rounded[0] * rounded[1] < settings.min_pixels:
        beta = sqrt(settings.min_pixels / (height * width))
        return ceil(width * beta / side) * side, ceil(height * beta / side) * side
    return rounded


def is_cut_by_lfm2(size: Size, settings: ImageSettings) -> bool:
    """Returns True if the image is larger than its limit by more than the tolerance, and may have tiles."""
    width, height = (max(settings.patch_size, round(length / settings.side) * settings.side) for length in size)
    return settings.max_tiles > 1 and width * height > settings.max_pixels * _TOLERANCE


def pixtral_resized(size: Size, settings: ImageSettings) -> Size:
    """Pixtral: at most the longest edge, then up to multiples of a row's side."""
    width, height = size
    ratio = max(height / settings.longest_edge, width / settings.longest_edge)
    if ratio > 1:
        width, height = floor(width / ratio), floor(height / ratio)
    return _up(max(width, 1), settings.side), _up(max(height, 1), settings.side)


def gemma4_resized(size: Size, settings: ImageSettings) -> Size:
    """Gemma 4: the largest multiples of a row's side with the image's aspect and at most the limit's pixels."""
    width, height = size
    side = settings.side
    factor = sqrt(settings.max_pixels / (height * width))
    tall, wide = floor(factor * height / side) * side, floor(factor * width / side) * side
    longest = settings.max_pixels // side**2 * side
    if tall == 0:
        return min(width // height * side, longest), side
    if wide == 0:
        return side, min(height // width * side, longest)
    return wide, tall


def kimi_resized(size: Size, settings: ImageSettings) -> Size:
    """Kimi-VL: as it is, or as small as its limit of patches needs. Padding to multiples of a row's side follows."""
    width, height = size
    patch = settings.patch_size
    patches = (width // patch) * (height // patch)
    most = settings.max_pixels // patch**2
    if patches > most:
        scale = sqrt(most / patches)
        width, height = max(int(width * scale), 1), max(int(height * scale), 1)
    if max(padded((width, height), settings)) // patch >= _MAX_POSITIONS:
        what = f"the limit of a side is {_MAX_POSITIONS * patch - 1}"
        raise ImageError(f"it has {size[0]} x {size[1]} pixels: {what}; send a smaller image, or a part of it")
    return width, height


def padded(size: Size, settings: ImageSettings) -> Size:
    return _up(size[0], settings.side), _up(size[1], settings.side)


def _up(length: int, step: int) -> int:
    return -(-length // step) * step


def idefics3_resized(size: Size, settings: ImageSettings) -> Size:
    """Idefics 3, first: the longer side has the longest edge's pixels, and the other an even number."""
    width, height = size
    longest, aspect = min(settings.longest_edge, _MAX_EDGE), width / height
    if width >= height:
        return longest, max(_even(int(longest / aspect)), 1)
    return max(_even(int(longest * aspect)), 1), longest


def idefics3_canvas(size: Size, settings: ImageSettings) -> Size:
    """Idefics 3, second: both sides are multiples of a tile's side."""
    width, height = size
    tile, aspect = settings.image_size, width / height
    if width >= height:
        width = _up(width, tile)
        return width, max(_up(int(width / aspect), tile), tile)
    height = _up(height, tile)
    return max(_up(int(height * aspect), tile), tile), height


def _even(length: int) -> int:
    return length + length % 2


def closest_grid(size: Size, settings: ImageSettings) -> Size:
    """InternVL and LFM2-VL: the columns and rows of tiles whose aspect is closest to the image's. Of equal ones, more
    tiles are taken while they have less than twice the image's pixels."""
    width, height = size
    aspect, best, least = width / height, (1, 1), float("inf")
    for columns, rows in _grids(settings.min_tiles, settings.max_tiles):
        difference = abs(aspect - columns / rows)
        is_filled = width * height > 0.5 * settings.image_size**2 * columns * rows
        if difference < least or (difference == least and is_filled):
            least, best = difference, (columns, rows)
    return best


def _grids(least: int, most: int) -> list[Size]:
    numbers = range(1, most + 1)
    return sorted((grid for grid in product(numbers, numbers) if least <= grid[0] * grid[1] <= most), key=_area)


def _area(size: Size) -> int:
    return size[0] * size[1]


@dataclass(frozen=True, slots=True)
class Canvas:
    """`image` is the size of the resized image in the upper left corner of the canvas; the rest is black."""

    image: Size
    columns: int
    rows: int


def llama4_canvas(size: Size, settings: ImageSettings) -> Canvas:
    """Llama 4: the grid of tiles that enlarges the image least, or else reduces it least, and of those the one with
    the least area. The reference computes scales in single precision."""
    tile = settings.image_size
    grids = _grids(1, settings.max_tiles)
    scales = {grid: min(_single(grid[0] * tile / size[0]), _single(grid[1] * tile / size[1])) for grid in grids}
    larger = [scale for scale in scales.values() if scale >= 1]
    chosen = min(larger) if larger else max(scales.values())
    columns, rows = min((grid for grid in grids if scales[grid] == chosen), key=_area)
    return Canvas(_llama4_image(size, (columns * tile, rows * tile), tile), columns, rows)


def _llama4_image(size: Size, canvas: Size, tile: int) -> Size:
    """Fits the image into the canvas. It is not enlarged, except to a tile's side."""
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

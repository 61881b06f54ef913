"""Rounds an image's size to multiples of a merge group's side, and nearly keeps the aspect ratio."""

from __future__ import annotations

from math import ceil, floor, sqrt

from llamaclust.model.images.families.family import Size
from llamaclust.model.images.settings import ImageError, ImageSettings

_MAX_ASPECT = 200


def smart_resized(size: Size, settings: ImageSettings) -> Size:
    """Returns the size that transformers' `smart_resize` returns, with `min_pixels` to `max_pixels` pixels."""
    width, height = size
    if max(size) / min(size) > _MAX_ASPECT:
        what = f"the longer side is more than {_MAX_ASPECT} times the shorter side"
        raise ImageError(f"the image has {width} x {height} pixels: {what}; send a part of the image")
    side = settings.side
    rounded = (round(width / side) * side, round(height / side) * side)
    return within(size, rounded, settings)


def within(size: Size, rounded: Size, settings: ImageSettings) -> Size:
    """Returns `rounded` if its pixel count is allowed, and otherwise a size with the aspect ratio of `size`."""
    width, height = size
    side = settings.side
    if rounded[0] * rounded[1] > settings.max_pixels:
        beta = sqrt((height * width) / settings.max_pixels)
        return max(side, floor(width / beta / side) * side), max(side, floor(height / beta / side) * side)
    if rounded[0] * rounded[1] < settings.min_pixels:
        beta = sqrt(settings.min_pixels / (height * width))
        return ceil(width * beta / side) * side, ceil(height * beta / side) * side
    return rounded


def up(length: int, step: int) -> int:
    return -(-length // step) * step

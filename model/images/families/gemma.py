from __future__ import annotations

from math import floor, sqrt

from llamaclust.model.images.families.family import Filter, ImageFamily, Size, between, fixed, free, whole
from llamaclust.model.images.settings import ImageSettings


def _square(_: Size, settings: ImageSettings) -> Size:
    return settings.image_size, settings.image_size


def _largest(size: Size, settings: ImageSettings) -> Size:
    """Returns the largest size with the same aspect ratio within the pixel limit, in multiples of `settings.side`."""
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


GEMMA3 = ImageFamily(fixed, whole(_square, Filter.BILINEAR), between("<start_of_image>", "<end_of_image>"))
GEMMA4 = ImageFamily(free, whole(_largest, Filter.BICUBIC), between("<|image>", "<image|>"))

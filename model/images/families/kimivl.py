from __future__ import annotations

from math import sqrt

from llamaclust.model.images.families.family import Cut, Filter, ImageFamily, Size, between, free
from llamaclust.model.images.families.rounding import up
from llamaclust.model.images.settings import ImageError, ImageSettings

_MAX_POSITIONS = 512
"""The number of patches on each side for which the encoder has RoPE frequencies."""


def _cut(size: Size, settings: ImageSettings) -> Cut:
    resized = _resized(size, settings)
    return Cut(Filter.BICUBIC, (resized,), canvas=_padded(resized, settings))


def _resized(size: Size, settings: ImageSettings) -> Size:
    width, height = size
    patch = settings.patch_size
    patches = (width // patch) * (height // patch)
    most = settings.max_pixels // patch**2
    if patches > most:
        scale = sqrt(most / patches)
        width, height = max(int(width * scale), 1), max(int(height * scale), 1)
    if max(_padded((width, height), settings)) // patch >= _MAX_POSITIONS:
        what = f"the limit of a side is {_MAX_POSITIONS * patch - 1}"
        raise ImageError(f"the image has {size[0]} x {size[1]} pixels: {what}; send a smaller image, or a part of it")
    return width, height


def _padded(size: Size, settings: ImageSettings) -> Size:
    return up(size[0], settings.side), up(size[1], settings.side)


KIMIVL = ImageFamily(free, _cut, between("<|media_start|>", "<|media_end|>"))

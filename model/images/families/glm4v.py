from __future__ import annotations

from llamaclust.model.images.families.family import Filter, ImageFamily, Size, between, free, whole
from llamaclust.model.images.families.rounding import smart_resized
from llamaclust.model.images.settings import ImageSettings


def _resized(size: Size, settings: ImageSettings) -> Size:
    width, height = size
    side = settings.side
    if min(size) < side:
        scale = max(side / height, side / width)
        width, height = int(width * scale), int(height * scale)
    return smart_resized((width, height), settings)


GLM4V = ImageFamily(free, whole(_resized, Filter.BICUBIC), between("<|begin_of_image|>", "<|end_of_image|>"))

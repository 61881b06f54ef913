from __future__ import annotations

from typing import TYPE_CHECKING

from llamaclust.model.images.families.family import Cut, Filter, ImageFamily, Size, between
from llamaclust.model.images.families.grids import closest_grid, tiled
from llamaclust.model.images.settings import ImageSettings

if TYPE_CHECKING:
    from llamaclust.model.projectors.keys import ImageNumbers

_TILES = (1, 12)


def _complete(settings: ImageSettings, numbers: ImageNumbers) -> ImageSettings:
    return tiled(settings, numbers, numbers.image_size, _TILES)


def _cut(size: Size, settings: ImageSettings) -> Cut:
    tile = settings.image_size
    columns, rows = closest_grid(size, settings)
    resizes = ((columns * tile, rows * tile),)
    if columns * rows == 1:
        return Cut(Filter.BICUBIC, resizes)
    return Cut(Filter.BICUBIC, resizes, tile=tile, overview=(tile, tile))


INTERNVL = ImageFamily(_complete, _cut, between("<img>", "</img>"))

"""The settings by which images are prepared for a projector."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

from llamaclust.model.images.families import FAMILIES
from llamaclust.model.images.settings import ImageSettings

if TYPE_CHECKING:
    from llamaclust.model.projectors.projector import Projector

_LOW_SIDE: Final = 512


def settings_of(projector: Projector) -> ImageSettings:
    """Returns a projector's image settings. The family's defaults replace numbers that the file lacks."""
    basic = ImageSettings(projector.name, projector.patch_size, projector.merge)
    return FAMILIES[projector.name].complete(basic, projector.images)


def low_detail(settings: ImageSettings) -> ImageSettings:
    """Returns the settings for OpenAI's `detail: low`: no tiles and, if the size is free, up to 512 x 512 pixels."""
    most = max(_LOW_SIDE // settings.side, 1) ** 2 * settings.side**2
    return replace(
        settings,
        min_pixels=min(settings.min_pixels, most),
        max_pixels=min(settings.max_pixels, most),
        min_tiles=min(settings.min_tiles, 1),
        max_tiles=min(settings.max_tiles, 1),
        longest_edge=min(settings.longest_edge, settings.image_size or _LOW_SIDE),
    )

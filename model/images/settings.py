"""The numbers by which images are prepared for a family of encoders."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Final

MAX_IMAGE_BYTES: Final = 20 << 20
"""The largest size of an image's file."""
CHANNELS: Final = 3
"""The bytes of a pixel of a tile."""
_ROUNDING: Final = 2
"""Rounding up and padding may enlarge a tile, but not beyond this many times its limit."""


class ImageError(ValueError):
    """An image that is not taken; the message is one line that says why and what to do."""


@dataclass(frozen=True, slots=True)
class ImageSettings:
    """The numbers of one projector. A limit that the family does not use is 0.

    projector: the projector's type in GGUF files (`clip.projector_type`), which names the family.
    patch_size, merge: a row of the encoder's result stands for merge x merge patches of patch_size x patch_size pixels.
    image_size: the side of a tile in pixels, where all tiles have the same size.
    longest_edge: idefics3: that of the image before it is cut; pixtral: the most pixels a side.
    min_pixels, max_pixels: those of a tile, where its size is free.
    min_tiles, max_tiles: those of an image, without the overview."""

    projector: str
    patch_size: int
    merge: int
    image_size: int = 0
    longest_edge: int = 0
    min_pixels: int = 0
    max_pixels: int = 0
    min_tiles: int = 0
    max_tiles: int = 0

    @property
    def side(self) -> int:
        """The side in pixels of the square that becomes one row."""
        return self.patch_size * self.merge

    @property
    def max_tile_bytes(self) -> int:
        """A bound on the bytes of all tiles of an image, which those that an encoder takes do not reach."""
        edge = self.image_size or self.longest_edge + self.side
        tiles_a_side = -(-self.longest_edge // self.image_size) if self.image_size else 0
        tiles = max(self.max_tiles, tiles_a_side**2) + 1  # an overview
        return tiles * max(edge**2, self.max_pixels) * CHANNELS * _ROUNDING

    def digest(self, image: bytes, projector_identity: str) -> bytes:
        """Returns the SHA-256 that identifies the rows of an image's bytes."""
        settings = repr(sorted(asdict(self).items()))
        head = f"{len(projector_identity)} {projector_identity} {settings} "
        return hashlib.sha256(head.encode() + image).digest()


def check_tiles(sizes: Sequence[tuple[int, int]], settings: ImageSettings) -> None:
    """Raises ImageError for tiles that are much larger than those of the encoder."""
    n_bytes = sum(width * height for width, height in sizes) * CHANNELS
    if n_bytes > settings.max_tile_bytes:
        what = f"its tiles have {n_bytes} bytes; the limit is {settings.max_tile_bytes}"
        raise ImageError(f"{what}: send a part of the image")

"""The numbers by which images are prepared for an encoder family."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Final

MAX_IMAGE_BYTES: Final = 20 << 20
CHANNELS: Final = 3
_ROUNDING: Final = 2
"""The factor by which a tile may exceed the pixel limit, because sides are rounded up or padded."""


class ImageError(ValueError):
    """An image was refused. The message is one line with the reason and what to do."""


@dataclass(frozen=True, slots=True)
class ImageSettings:
    """The numbers of one projector. A limit that the family does not use is 0.

    projector: the projector's type in GGUF files (`clip.projector_type`), which is the family's name.
    patch_size, merge: a row of the encoder's result has merge x merge patches of patch_size x patch_size pixels.
    image_size: the side of a tile in pixels, if all tiles have the same size.
    longest_edge: for idefics3, the longer side of the resized image in pixels. For pixtral, this side's maximum.
    min_pixels, max_pixels: limits of a tile of free size.
    min_tiles, max_tiles: limits of an image, without the overview."""

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
        return self.patch_size * self.merge

    @property
    def max_tile_bytes(self) -> int:
        edge = self.image_size or self.longest_edge + self.side
        tiles_a_side = -(-self.longest_edge // self.image_size) if self.image_size else 0
        tiles = max(self.max_tiles, tiles_a_side**2) + 1  # The last tile is the overview.
        return tiles * max(edge**2, self.max_pixels) * CHANNELS * _ROUNDING

    def digest(self, image: bytes, projector_identity: str) -> bytes:
        """Returns a SHA-256 that identifies the embedding rows of an image."""
        settings = repr(sorted(asdict(self).items()))
        head = f"{len(projector_identity)} {projector_identity} {settings} "
        return hashlib.sha256(head.encode() + image).digest()


def check_tiles(sizes: Sequence[tuple[int, int]], settings: ImageSettings) -> None:
    n_bytes = sum(width * height for width, height in sizes) * CHANNELS
    if n_bytes > settings.max_tile_bytes:
        what = f"the image's tiles have {n_bytes} bytes; the limit is {settings.max_tile_bytes}"
        raise ImageError(f"{what}: send a part of the image")

"""The numbers by which images are prepared for a family of encoders."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from typing import Final

MAX_IMAGE_BYTES: Final = 20 << 20
"""The largest size of an image's file."""


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

    def digest(self, image: bytes, projector_identity: str) -> bytes:
        """Returns the SHA-256 that identifies the rows of an image's bytes."""
        settings = repr(sorted(asdict(self).items()))
        head = f"{len(projector_identity)} {projector_identity} {settings} "
        return hashlib.sha256(head.encode() + image).digest()

"""Reads facts from an image's bytes: the format and a WebP file's canvas, which are needed before a decoder runs, and
the orientation in a photo's EXIF data, for which Pillow would need more plugins."""

from __future__ import annotations

import struct
from enum import Enum
from typing import Final

_ORIENTATION_TAG: Final = 0x0112
_SHORT: Final = 3
_MAX_ENTRIES: Final = 1 << 12


class ImageFormat(Enum):
    PNG = "PNG"
    JPEG = "JPEG"
    WEBP = "WebP"
    GIF = "GIF"
    BMP = "BMP"


def format_of(image: bytes) -> ImageFormat | None:
    """Returns the image format from the first bytes, or None if it is not supported. Ignores the media type."""
    if image.startswith(b"RIFF") and image[8:12] == b"WEBP":
        return ImageFormat.WEBP
    starts = {
        b"\x89PNG\r\n\x1a\n": ImageFormat.PNG,
        b"\xff\xd8\xff": ImageFormat.JPEG,
        b"GIF87a": ImageFormat.GIF,
        b"GIF89a": ImageFormat.GIF,
        b"BM": ImageFormat.BMP,
    }
    return next((found for start, found in starts.items() if image.startswith(start)), None)


def webp_size(image: bytes) -> tuple[int, int]:
    """Returns the width and height of a WebP file's canvas, or (0, 0) if they are missing."""
    kind, body = image[12:16], image[20:30]
    if len(body) < 10:
        return 0, 0
    if kind == b"VP8X":
        return 1 + int.from_bytes(body[4:7], "little"), 1 + int.from_bytes(body[7:10], "little")
    if kind == b"VP8L":
        bits = int.from_bytes(body[1:5], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if kind == b"VP8 ":
        width, height = struct.unpack("<HH", body[6:10])
        return width & 0x3FFF, height & 0x3FFF
    return 0, 0


def orientation_of(exif: bytes) -> int:
    """Returns the EXIF orientation, 1 to 8. 1 means upright or unknown."""
    data = exif.removeprefix(b"Exif\0\0")
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(data[:4])
    if order is None or len(data) < 8:
        return 1
    (start,) = struct.unpack_from(f"{order}I", data, 4)
    if start + 2 > len(data):
        return 1
    (count,) = struct.unpack_from(f"{order}H", data, start)
    for place in range(start + 2, start + 2 + 12 * min(count, _MAX_ENTRIES), 12):
        if place + 12 > len(data):
            break
        tag, kind, _, value = struct.unpack_from(f"{order}HHIH", data, place)
        if tag == _ORIENTATION_TAG:
            return value if kind == _SHORT and 1 <= value <= 8 else 1
    return 1

"""Tests of properties that are read from an image's bytes without a decoder."""

from __future__ import annotations

import io
import struct

import pytest
from PIL import Image

from llamaclust.model.images.formats import ImageFormat, format_of, orientation_of, webp_size


def webp(size: tuple[int, int], **options: object) -> bytes:
    out = io.BytesIO()
    Image.new(str(options.pop("mode", "RGB")), size, 200).save(out, "WEBP", **options)
    return out.getvalue()


@pytest.mark.parametrize("size", [(1, 1), (17, 300), (1023, 2)])
def test_the_canvas_of_webp_files_of_each_kind(size: tuple[int, int]) -> None:
    frames = [Image.new("RGB", size, colour) for colour in ("red", "blue")]
    kinds = {
        b"VP8 ": webp(size),
        b"VP8L": webp(size, lossless=True),
        b"VP8X": webp(size, save_all=True, append_images=frames),
    }
    for kind, picture in kinds.items():
        assert picture[12:16] == kind and webp_size(picture) == size
        assert format_of(picture) is ImageFormat.WEBP
        assert webp_size(picture[:25]) == (0, 0)
    assert webp_size(b"RIFF\0\0\0\0WEBPVP9 " + bytes(20)) == (0, 0)


@pytest.mark.parametrize("order", ["<", ">"])
def test_the_orientation_is_read_in_both_byte_orders_after_other_entries(order: str) -> None:
    mark = b"II*\0" if order == "<" else b"MM\0*"
    for value in (1, 6, 8):
        entries = struct.pack(f"{order}HHII", 0x010F, 2, 4, 0) + struct.pack(f"{order}HHIHH", 0x0112, 3, 1, value, 0)
        tiff = mark + struct.pack(f"{order}IH", 8, 2) + entries
        assert orientation_of(tiff) == orientation_of(b"Exif\0\0" + tiff) == value
        assert all(orientation_of(tiff[:end]) == 1 for end in range(len(tiff) - 4))


@pytest.mark.parametrize("value", [0, 9, 65535])
def test_an_orientation_out_of_range_is_upright(value: int) -> None:
    entry = struct.pack("<HHIHH", 0x0112, 3, 1, value, 0)
    assert orientation_of(b"II*\0" + struct.pack("<IH", 8, 1) + entry) == 1
    assert orientation_of(b"II*\0" + struct.pack("<IH", 1 << 31, 1) + entry) == 1

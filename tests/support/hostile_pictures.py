"""Images that attack decoders: random mutations of samples in each format, and fixed images."""

from __future__ import annotations

import gzip
import io
import struct
import zlib
from collections.abc import Iterator
from random import Random
from typing import Any

import numpy as np
from PIL import Image

_HEADER_BYTES = 64


def _saved(image: Image.Image, name: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, name, **options)
    return out.getvalue()


def samples() -> list[bytes]:
    """Returns small images of each format and kind, with metadata."""
    noise = Image.fromarray(np.random.default_rng(3).integers(0, 256, (24, 40, 4), dtype=np.uint8))
    rgb, gray, palette = noise.convert("RGB"), noise.convert("L"), noise.convert("RGB").convert("P")
    deep = Image.fromarray(np.asarray(gray).astype(np.uint16) * 257)
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "camera"
    others = [rgb.transpose(Image.Transpose.FLIP_LEFT_RIGHT), rgb]
    return [
        _saved(rgb, "PNG", exif=exif),
        _saved(noise, "PNG"),
        _saved(deep, "PNG"),
        _saved(palette, "PNG", transparency=3),
        _saved(rgb, "PNG", save_all=True, append_images=others),
        _saved(rgb, "JPEG", exif=exif, quality=60),
        _saved(rgb, "JPEG", progressive=True, dpi=(72, 72), comment=b"hello"),
        _saved(gray, "JPEG"),
        _saved(rgb.convert("CMYK"), "JPEG"),
        _saved(rgb, "WEBP", exif=exif),
        _saved(noise, "WEBP", lossless=True),
        _saved(rgb, "WEBP", save_all=True, append_images=others),
        _saved(palette, "GIF"),
        _saved(palette, "GIF", save_all=True, append_images=others, transparency=2),
        _saved(rgb, "BMP"),
        _saved(palette, "BMP"),
        _saved(noise, "BMP"),
        _saved(gray.convert("1"), "BMP"),
    ]


def png(width: int, height: int, data: bytes = b"", bits: int = 8, colour: int = 2) -> bytes:
    parts = {b"IHDR": struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0), b"IDAT": data, b"IEND": b""}
    chunks = (
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in parts.items()
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def jpeg_with_scans(count: int) -> bytes:
    """Returns a progressive JPEG file that repeats the last scan. Each scan covers the whole image."""
    data = _saved(Image.new("RGB", (3000, 3000), (90, 120, 30)), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * count + data[-2:]


def chosen() -> dict[str, bytes]:
    """Returns images that must be refused, by name. Truncated animations are not included, because their first frame is
    complete."""
    gif, bmp = samples()[12], samples()[14]
    jpeg = samples()[5]
    frame = jpeg.index(b"\xff\xc0")
    webp = b"WEBPVP8X" + struct.pack("<I", 10) + b"\x10\0\0\0" + b"\xff" * 6
    zeros = zlib.compress(bytes(1 << 20), 9)
    return {
        "empty": b"",
        "svg": b"<?xml version='1.0'?><svg xmlns='http://www.w3.org/2000/svg'/>",
        "html": b"<!doctype html><img src=x>",
        "pdf": b"%PDF-1.7\n",
        "tiff": b"II*\0\x08\0\0\0\0\0",
        "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n",
        "psd": b"8BPS\0\x01" + bytes(20),
        "icon": b"\0\0\x01\0\x01\0" + bytes(20),
        "heic": b"\0\0\0\x18ftypheic" + bytes(20),
        "png 0 x 9": png(0, 9, zeros),
        "png 9 x 0": png(9, 0, zeros),
        "png 65000 x 65000": png(65000, 65000, zeros),
        "png 2^31": png((1 << 31) - 1, (1 << 31) - 1, zeros),
        "png of 1 bit": png(1 << 20, 1 << 20, zeros, 1, 0),
        "png without data": png(30, 30),
        "png of other bytes": png(30, 30, b"no zlib"),
        "gif 65535 x 65535": gif[:6] + b"\xff" * 4 + gif[10:],
        "jpeg 65535 x 65535": jpeg[: frame + 5] + b"\xff" * 4 + jpeg[frame + 9 :],
        "jpeg 0 x 0": jpeg[: frame + 5] + bytes(4) + jpeg[frame + 9 :],
        "bmp 65000 x 65000": bmp[:18] + struct.pack("<ii", 65000, 65000) + bmp[26:],
        "bmp 0 x 5": bmp[:18] + struct.pack("<ii", 0, 5) + bmp[26:],
        "bmp -2^31": bmp[:18] + struct.pack("<ii", -(1 << 31), -(1 << 31)) + bmp[26:],
        "webp 2^24 x 2^24": b"RIFF" + struct.pack("<I", len(webp)) + webp,
        "webp of nothing": b"RIFF\0\0\0\0WEBP",
        **{
            f"sample {number}, cut": data[: len(data) * 2 // 3]
            for number, data in enumerate(samples())
            if number not in (4, 13)
        },
    }


def mutations(random: Random, count: int) -> Iterator[bytes]:
    """Yields damaged copies of the samples. Most copies have valid PNG checksums, so that decoders read the chunks."""
    originals = samples()
    for number in range(count):
        original = originals[number % len(originals)]
        data = bytearray(original)
        for _ in range(random.choice((1, 1, 2, 4, 16))):
            _mutate(random, data, random.choice(originals))
        yield _with_checksums(bytes(data)) if random.random() < 0.8 else bytes(data)


def _mutate(random: Random, data: bytearray, other: bytes) -> None:
    if not data:
        return
    at = random.randrange(min(len(data), _HEADER_BYTES) if random.random() < 0.5 else len(data))
    kind = random.randrange(6)
    if kind == 0:
        data[at] = random.randrange(256)
    elif kind == 1:
        data[at : at + 4] = struct.pack(
            random.choice("<>") + "I", random.choice((0, 1, 0xFFFF, 1 << 31, (1 << 32) - 1))
        )
    elif kind == 2:
        del data[at : at + random.randrange(1, 100)]
    elif kind == 3:
        data[at:at] = data[at : at + random.randrange(1, 200)] * random.randrange(1, 20)
    elif kind == 4:
        start = random.randrange(len(other))
        data[at : at + 30] = other[start : start + 30]
    else:
        data[at] ^= 1 << random.randrange(8)


def _with_checksums(data: bytes) -> bytes:
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        return data
    out, at = data[:8], 8
    while at + 12 <= len(data):
        (size,) = struct.unpack_from(">I", data, at)
        body = data[at + 4 : at + 8 + size]
        if at + 12 + size > len(data):
            break
        out += data[at : at + 4] + body + struct.pack(">I", zlib.crc32(body))
        at += 12 + size
    return out + data[at:]


def in_disguise() -> dict[str, bytes]:
    """Returns files with a header that does not match their content, by name. All must be refused."""
    whole = png(30, 30, zlib.compress(bytes(91 * 30)))
    return {
        "gif of a script": b"GIF89a=1;alert(1)//" + bytes(30),
        "bmp of html": b"BM<!doctype html><script>alert(1)</script>" + bytes(40),
        "webp of html": b"RIFF\x40\0\0\0WEBP<!doctype html>" + bytes(60),
        "wave": b"RIFF\x24\0\0\0WAVEfmt " + bytes(30),
        "jpeg of php": b"\xff\xd8\xff\xe0<?php system('id');" + bytes(30),
        "png of zip": b"\x89PNG\r\n\x1a\nPK\3\4" + bytes(60),
        "pdf before png": b"%PDF-1.7\n" + whole,
        "html before png": b"<html>" + whole,
        "line break before png": b"\n" + whole,
        "compressed svg": gzip.compress(b"<svg xmlns='http://www.w3.org/2000/svg'/>"),
        "portable pixmap": b"P6 65535 65535 255\n" + bytes(99),
        "x bitmap": b"#define a_width 65535\n#define a_height 65535\nstatic char a_bits[] = {0};",
    }


def large_animations() -> dict[str, bytes]:
    """Returns animations of 300 small frames, and a large image of few bytes. All must be accepted."""
    frames = [Image.new("P", (200, 200), number % 256) for number in range(300)]
    rgb = [frame.convert("RGB") for frame in frames]
    return {
        "gif": _saved(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "png": _saved(rgb[0], "PNG", save_all=True, append_images=rgb[1:]),
        "webp": _saved(rgb[0], "WEBP", save_all=True, append_images=rgb[1:], method=0),
        "large": _saved(Image.new("1", (5000, 5000)), "PNG"),
    }

"""Decodes images with Pillow, but imports only five of Pillow's plugins. Only child processes import this module,
because decoders are native code and images are untrusted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from io import BytesIO
from types import MappingProxyType

from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.Image import Image, Transpose, alpha_composite, new
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from llamaclust.model.images.formats import ImageFormat, format_of, orientation_of, webp_size
from llamaclust.model.images.settings import ImageError

_UNIDENTIFIED, _NO_HEADER = "not identified by this driver", "its header is damaged, or it has no pixels"
_STRIP_PIXELS = 1 << 20
_DEEP_GRAY = ("I;16", "I;16B", "I;16L", "I;16N")
_TURNS: Mapping[int, Transpose] = MappingProxyType(
    {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
)


_JPEG = type("_Jpeg", (JpegImageFile,), {"_read_dpi_from_exif": lambda _: None})
"""A JPEG reader that ignores the resolution in EXIF data, because Pillow's search for it imports a TIFF plugin."""


_FILES: Mapping[ImageFormat, Callable[[BytesIO], Image]] = MappingProxyType(
    {
        ImageFormat.PNG: PngImageFile,
        ImageFormat.JPEG: _JPEG,
        ImageFormat.WEBP: WebPImageFile,
        ImageFormat.GIF: GifImageFile,
        ImageFormat.BMP: BmpImageFile,
    }
)


def decode(data: bytes, max_pixels: int) -> Image:
    """Returns an upright RGB image (the first frame of an animation). Transparent parts become white, as in
    transformers' image processors; transformers' `load_image` drops transparency. Raises ImageError if the bytes cannot
    be decoded, and MemoryError if memory is short."""
    kind = format_of(data)
    if kind is None:
        *first, last = (each.value for each in ImageFormat)
        raise ImageError(f"the image is not a {', '.join(first)} or {last} file: {_shown(data)}")
    if kind is ImageFormat.WEBP:
        _check_size(webp_size(data), max_pixels)
    try:
        image = _FILES[kind](BytesIO(data))
        _check_size(image.size, max_pixels)
        upright = _TURNS.get(orientation_of(_exif(image)))
        image.load()
        rgb = _rgb(image)
    except (ImageError, MemoryError):
        raise
    except Exception as error:  # noqa: BLE001  decoders raise exceptions of any type
        what = _NO_HEADER if str(error) == _UNIDENTIFIED else " ".join(str(error).split()) or type(error).__name__
        raise ImageError(f"the {kind.value} file cannot be decoded: {what}; send it again, or as PNG") from None
    del image
    return rgb if upright is None else rgb.transpose(upright)


def _shown(data: bytes) -> str:
    if not data:
        return "it has no bytes; send an image"
    return f"it begins with {data[:16]!r}; convert it first"


def _check_size(size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise ImageError(f"the image has {width} x {height} pixels; send one with at least 1 x 1")
    if width * height > max_pixels:
        what = f"the image has {width} x {height} = {width * height} pixels"
        raise ImageError(f"{what}; the limit is {max_pixels}: send a smaller image")


def _exif(image: Image) -> bytes:
    found = image.info.get("exif", b"")
    return found if isinstance(found, bytes) else b""


def _rgb(image: Image) -> Image:
    if image.mode in _DEEP_GRAY:
        image = image.point(lambda value: value * (1 / 256)).convert("L")  # Keeps the high byte.
    if "A" not in image.getbands() and image.info.get("transparency") is None:
        return image.convert("RGB")
    if image.mode != "RGBA":
        image = image.convert("RGBA")
    return _over_white(image)


def _over_white(image: Image) -> Image:
    """Returns the image on a white background. Works in strips, so that only the two images take much memory."""
    out = new("RGB", image.size)
    lines = max(_STRIP_PIXELS // image.width, 1)
    for top in range(0, image.height, lines):
        strip = image.crop((0, top, image.width, min(top + lines, image.height)))
        white = new("RGBA", strip.size, (255, 255, 255, 255))
        out.paste(alpha_composite(white, strip).convert("RGB"), (0, top))
    return out

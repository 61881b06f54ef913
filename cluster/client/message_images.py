"""Converts the images of a client's messages (paths, bytes of files, or Pillow images) to parts of a request."""

from __future__ import annotations

import io
import json
import sys
from base64 import b64encode
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import accumulate, repeat
from os import PathLike, fspath
from pathlib import Path
from typing import Any, Final

from llamaclust.cluster.config.values import expand_home
from llamaclust.cluster.front.text.images import MAX_IMAGES
from llamaclust.core.errors import UsageError
from llamaclust.core.limits import MAX_BODY_BYTES
from llamaclust.core.regular_file import read_bytes
from llamaclust.model.images.formats import ImageFormat, format_of
from llamaclust.model.images.settings import MAX_IMAGE_BYTES

_PNG_MODES: Final = ("1", "L", "LA", "P", "RGB", "RGBA")
_OTHER_BYTES: Final = 1 << 16
"""Bytes reserved for the fields of a request other than its messages."""


def message_json(message: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a message in OpenAI's form, with its images as parts. Raises UsageError if an image is unusable."""
    content = message.get("content")
    if isinstance(content, Sequence) and not isinstance(content, str | bytes | bytearray):
        return {**message, "content": [_part(part) for part in content]}
    return {**message, "content": [_part(content)]} if _is_image(content) else dict(message)


def image_part(image: object) -> dict[str, Any]:
    """Converts an image (path, file bytes or Pillow image) to an OpenAI part. Raises UsageError if it is unusable."""
    data, name = _bytes_of(image)
    kind = format_of(data)
    if kind is None:
        *first, last = (each.value for each in ImageFormat)
        raise UsageError(f"{name}: not an image; expected a {', '.join(first)} or {last} file")
    if len(data) > MAX_IMAGE_BYTES:
        raise UsageError(f"{name}: the image has {len(data)} bytes; the limit is {MAX_IMAGE_BYTES}: send a smaller one")
    url = f"data:image/{kind.value.lower()};base64,{b64encode(data).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def has_images(message: Mapping[str, Any]) -> bool:
    return bool(_images_of(message))


def with_latest_images(
    messages: Sequence[Mapping[str, Any]], body_bytes: int = MAX_BODY_BYTES
) -> tuple[list[Mapping[str, Any]], int]:
    """Removes the oldest images so that the request fits into `body_bytes`. Returns the messages and the number of
    removed images. Raises UsageError if an image of the last message does not fit."""
    sizes = [(at, _json_bytes(part)) for at, message in enumerate(messages) for part in _images_of(message)]
    if not sizes:
        return [*messages], 0
    most_bytes = body_bytes - _OTHER_BYTES
    free_bytes = most_bytes - _json_bytes([*map(_without_images, messages, repeat(None))])
    fitting = 0
    for _, size in reversed(sizes[-MAX_IMAGES:]):
        free_bytes -= size
        if free_bytes < 0:
            break
        fitting += 1
    missing = len(sizes) - fitting
    if missing and sizes[missing - 1][0] == len(messages) - 1:
        what = f"the images of one message exceed the limit of {MAX_IMAGES} images and {most_bytes} bytes in a request"
        raise UsageError(f"{what}; send fewer or smaller images")
    counts = Counter(at for at, _ in sizes[:missing])
    return [_without_images(message, counts[at]) for at, message in enumerate(messages)], missing


def _images_of(message: Mapping[str, Any]) -> list[Any]:
    content = message.get("content")
    return [part for part in content if _is_image_part(part)] if isinstance(content, list) else []


def _without_images(message: Mapping[str, Any], count: int | None) -> Mapping[str, Any]:
    images = _images_of(message)
    kept = [] if count is None else images[count:]
    if len(kept) == len(images):
        return message
    parts, numbers = message["content"], accumulate(map(_is_image_part, message["content"]))
    places = zip(parts, numbers, strict=True)
    shown = [part for part, number in places if not _is_image_part(part) or number > len(images) - len(kept)]
    return {**message, "content": shown or ""}


def _is_image_part(part: object) -> bool:
    return isinstance(part, Mapping) and part.get("type") == "image_url"


def _json_bytes(value: object) -> int:
    return len(json.dumps(value, default=str)) + len(", ")


def _part(part: object) -> Any:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    return image_part(part) if _is_image(part) else part


def _is_image(value: object) -> bool:
    return isinstance(value, bytes | bytearray | PathLike) or _is_pillow(value)


def _is_pillow(value: object) -> bool:
    """Returns True for a Pillow image, without importing Pillow."""
    pillow = sys.modules.get("PIL.Image")
    return pillow is not None and isinstance(value, pillow.Image)


def _bytes_of(image: Any) -> tuple[bytes, str]:
    if isinstance(image, bytes | bytearray):
        return bytes(image), "image"
    if isinstance(image, PathLike):
        name = str(fspath(image))
        try:
            return read_bytes(Path(expand_home(name)), MAX_IMAGE_BYTES), name
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise UsageError(f"{name}: {reason}; give the path of an image") from error
    out = io.BytesIO()
    try:
        _for_png(image).save(out, "PNG")
    except (OSError, ValueError) as error:
        raise UsageError(f"image: {error}; give an image that can be saved as PNG") from error
    return out.getvalue(), "image"


def _for_png(image: Any) -> Any:
    if image.mode.startswith("I"):
        return image.convert("I").convert("I;16")  # A direct conversion from I;16B or to RGB clips values at 255.
    return image if image.mode in _PNG_MODES else image.convert("RGB")

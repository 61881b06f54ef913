"""Images in the messages of a client: files, bytes and Pillow's images become parts of a request."""

from __future__ import annotations

import io
import sys
from base64 import b64encode
from collections.abc import Mapping, Sequence
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from llamaclust.cluster.config.values import expand_home
from llamaclust.core.errors import UsageError
from llamaclust.core.regular_file import read_bytes
from llamaclust.model.images.formats import ImageFormat, format_of
from llamaclust.model.images.settings import MAX_IMAGE_BYTES


def message_json(message: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a message in OpenAI's form. Its content may be a text, an image, or a list of both and of OpenAI's parts.
    Raises UsageError for an image that cannot be sent."""
    content = message.get("content")
    if isinstance(content, Sequence) and not isinstance(content, str | bytes | bytearray):
        return {**message, "content": [_part(part) for part in content]}
    return {**message, "content": [_part(content)]} if _is_image(content) else dict(message)


def image_part(image: object) -> dict[str, Any]:
    """Returns OpenAI's part of an image: a path, the bytes of a file, or an image of Pillow. Raises UsageError."""
    data, name = _bytes_of(image)
    kind = format_of(data)
    if kind is None:
        *first, last = (each.value for each in ImageFormat)
        raise UsageError(f"{name}: not an image; expected a {', '.join(first)} or {last} file")
    if len(data) > MAX_IMAGE_BYTES:
        raise UsageError(f"{name}: {len(data)} bytes; the limit of an image is {MAX_IMAGE_BYTES}: send a smaller one")
    url = f"data:image/{kind.value.lower()};base64,{b64encode(data).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def has_images(message: Mapping[str, Any]) -> bool:
    content = message.get("content")
    return isinstance(content, list) and any(part.get("type") == "image_url" for part in content)


def _part(part: object) -> Any:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    return image_part(part) if _is_image(part) else part


def _is_image(value: object) -> bool:
    return isinstance(value, bytes | bytearray | PathLike) or _is_pillow(value)


def _is_pillow(value: object) -> bool:
    """Does not import Pillow: a program without it has no such image."""
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
    image.save(out, "PNG")
    return out.getvalue(), "image"

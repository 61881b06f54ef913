"""Reads images from the request bodies of all APIs, and checks them."""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping
from typing import Any, Final, ParamSpec, TypeVar

from llamaclust.cluster.front.images.urls import WEB
from llamaclust.cluster.front.schema import BodyContext, PlacedError, takes_images
from llamaclust.cluster.front.text.images import DETAILS, Part, image_part
from llamaclust.cluster.front.tools import is_image, media_text
from llamaclust.cluster.scheduler.validation import shown
from llamaclust.model.images.settings import MAX_IMAGE_BYTES

_DIGITS: Final = f"{string.ascii_letters}{string.digits}+/".encode()
_BREAKS: Final = str.maketrans("", "", "\r\n")

_Arguments = ParamSpec("_Arguments")
_Made = TypeVar("_Made")


_DATA: Final = "data:"
_SCHEME: Final = len(max(WEB, key=len))  # Maximum number of characters of a scheme, which may have capitals.
_URLS: Final = ("image_url", "url", "file_url")
_BYTES: Final = ("data", "base64", "image", "file_data")
_OBJECTS: Final = ("image_url", "source", "file", "image")
_MEDIA_TYPES: Final = ("media_type", "mimeType", "mime_type", "mediaType")


def media_part(part: Mapping[str, Any], context: object) -> Part:
    """Reads an image in the form of any API: OpenAI's `image_url` and `input_image`, Anthropic's `source`, MCP's
    `data`, an image file, or the image or its URL alone. Other media become a text. Raises ValueError for an image in
    an unknown form, or for other media unless `context` is a `LenientContext`."""
    kind = str(part["type"])
    if not takes_images(context):
        return media_text(kind, context)
    place, fields = next(((name, part[name]) for name in _OBJECTS if isinstance(part.get(name), dict)), (kind, part))
    detail = part.get("detail", fields.get("detail"))
    if not is_image(kind) and not _is_image_file(part, fields):
        return media_text(kind, context)
    for name in (*_URLS, *_BYTES):
        if (image := fields.get(name)) is not None:
            return (url_part if name in _URLS else base64_part)(place, image, context, detail)
    forms = "`image_url` or `url` (a data URL or an http(s) URL), or `data` (base64)"
    raise ValueError(f"{place}: expected the image in one of the fields {forms}, found {', '.join(fields)[:200]}")


def _is_image_file(part: Mapping[str, Any], fields: Mapping[str, Any]) -> bool:
    data = fields.get("file_data")
    types = [each.get(name) for each in (part, fields) for name in _MEDIA_TYPES]
    types += [data[len(_DATA) : _SCHEME + len(_DATA)]] if isinstance(data, str) else []
    return any(isinstance(each, str) and each[:6].lower() == "image/" for each in types)


def url_part(kind: str, url: object, context: object, detail: object = None) -> Part:
    """Reads an image from a data URL or an allowed http(s) URL. Raises ValueError if the URL or `detail` is invalid."""
    if not takes_images(context):
        return media_text(kind, context)
    if not isinstance(url, str):
        raise ValueError(f"{kind}: expected the image as a URL, found {shown(url)}")
    url = url[:_SCHEME].lower() + url[_SCHEME:]
    chosen = checked_detail(detail)
    if url.startswith(WEB):
        assert isinstance(context, BodyContext) and context.images is not None
        context.images.check(url)
        return image_part(url, chosen)
    head, comma, data = url.partition(",")
    if not (comma and head.startswith(_DATA) and head.lower().endswith(";base64")):
        forms = "a data URL with base64 (data:image/png;base64,...) or an http(s) URL"
        raise ValueError(f"expected {forms}, found {shown(url[:60])}")
    return image_part(f"{head},{checked_base64(data)}", chosen)


def placed(place: str, read: Callable[_Arguments, _Made], *given: _Arguments.args, **named: _Arguments.kwargs) -> _Made:
    try:
        return read(*given, **named)
    except ValueError as error:
        raise PlacedError(f"{place}: {error}") from error


def base64_part(kind: str, data: object, context: object, detail: object = None) -> Part:
    """Reads an image from base64, and detects its format from its bytes. Raises ValueError if the data is invalid."""
    if not takes_images(context):
        return media_text(kind, context)
    if not isinstance(data, str):
        raise ValueError(f"{kind}: expected the image as base64, found {shown(data)}")
    if data[:_SCHEME].lower().startswith((_DATA, *WEB)):
        return url_part(kind, data, context, detail)
    return image_part(f"data:;base64,{checked_base64(data)}", checked_detail(detail))


def checked_detail(detail: object) -> str:
    if detail not in (None, *DETAILS):
        raise ValueError(f"detail: expected one of {', '.join(DETAILS)}, found {shown(detail)}")
    return str(detail or DETAILS[0])


def checked_base64(data: str) -> str:
    """Returns base64 without line breaks and with padding. Raises ValueError if the text is not base64 or the image is
    too large."""
    try:
        data.encode("ascii")  # With other characters, `translate` would block the interpreter for up to a second.
    except UnicodeEncodeError as error:
        raise ValueError(f"expected an image in base64, found the character {data[error.start]!r}") from None
    data = data.translate(_BREAKS) if "\n" in data else data
    size = len(data) * 3 // 4
    if size > MAX_IMAGE_BYTES + 2:
        raise ValueError(f"expected an image of at most {MAX_IMAGE_BYTES} bytes, found {size}: send a smaller one")
    if not data:
        raise ValueError("expected an image, found no bytes")
    digits = data.removesuffix("=").removesuffix("=").encode("ascii")
    if others := digits.translate(None, _DIGITS):
        raise ValueError(f"expected an image in base64, found the character {chr(others[0])!r}")
    if len(digits) % 4 == 1:
        raise ValueError(f"expected an image in base64, found a part of one: {len(digits)} characters without padding")
    return digits.decode("ascii") + "=" * (-len(digits) % 4)

"""Reads images from the request bodies of all APIs, and checks them."""

from __future__ import annotations

import string
from collections.abc import Callable
from typing import Final, ParamSpec, TypeVar

from llamaclust.cluster.front.images.urls import WEB
from llamaclust.cluster.front.schema import BodyContext, PlacedError
from llamaclust.cluster.front.text.images import DETAILS, Part, image_part
from llamaclust.cluster.front.tools import media_text
from llamaclust.cluster.scheduler.validation import shown
from llamaclust.model.images.settings import MAX_IMAGE_BYTES

_DIGITS: Final = f"{string.ascii_letters}{string.digits}+/".encode()
_BREAKS: Final = str.maketrans("", "", "\r\n")

_Arguments = ParamSpec("_Arguments")
_Made = TypeVar("_Made")


def takes_images(context: object) -> bool:
    return isinstance(context, BodyContext) and context.images is not None


def url_part(kind: str, url: object, context: object, detail: object = None) -> Part:
    """Reads an image from a data URL or an allowed http(s) URL. Raises ValueError if the URL or `detail` is invalid."""
    if not takes_images(context):
        return media_text(kind, context)
    if not isinstance(url, str):
        raise ValueError(f"{kind}: expected the image as a URL, found {shown(url)}")
    if detail not in (None, *DETAILS):
        raise ValueError(f"detail: expected one of {', '.join(DETAILS)}, found {shown(detail)}")
    chosen = str(detail or DETAILS[0])
    if url.startswith(WEB):
        assert isinstance(context, BodyContext) and context.images is not None
        context.images.check(url)
        return image_part(url, chosen)
    head, comma, data = url.partition(",")
    if not (head.startswith("data:") and comma and head.endswith(";base64")):
        forms = "a data URL with base64 (data:image/png;base64,...) or an http(s) URL"
        raise ValueError(f"expected {forms}, found {shown(url[:60])}")
    return image_part(f"{head},{checked_base64(data)}", chosen)


def placed(place: str, read: Callable[_Arguments, _Made], *given: _Arguments.args, **named: _Arguments.kwargs) -> _Made:
    try:
        return read(*given, **named)
    except ValueError as error:
        raise PlacedError(f"{place}: {error}") from error


def base64_part(kind: str, data: object, context: object) -> Part:
    """Reads an image from base64, and detects its format from its bytes. Raises ValueError if the data is invalid."""
    if not takes_images(context):
        return media_text(kind, context)
    if not isinstance(data, str):
        raise ValueError(f"{kind}: expected the image as base64, found {shown(data)}")
    if data.startswith("data:"):
        return url_part(kind, data, context)
    return image_part(f"data:;base64,{checked_base64(data)}")


def checked_base64(data: str) -> str:
    """Removes line breaks from base64. Raises ValueError if the text is not base64 or the image is too large."""
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
    if len(data) % 4:
        raise ValueError(f"expected an image in base64, with a multiple of 4 characters, found {len(data)}")
    return data

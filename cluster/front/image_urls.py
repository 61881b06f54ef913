"""URLs of pictures: which hosts are allowed, and the pictures of a request, which its journal record keeps."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Final
from urllib.parse import urlsplit

from llamaclust.cluster.front.text.images import MAX_IMAGES, MAX_IMAGES_BYTES, image_urls
from llamaclust.cluster.front.text.request import ChatRequest
from llamaclust.cluster.state.journal_records import RequestContext
from llamaclust.core.errors import ParameterError, RequestFailedError

WEB: Final = ("http://", "https://")
MAX_JOURNALLED_BYTES: Final = 16 << 20
"""The largest size of a request's pictures that the journal keeps."""
_LONGEST: Final = 4096
_PORTS: Final = {"http": 80, "https": 443}
_HOST: Final = re.compile(r"[a-z0-9.-]{1,253}")
_TARGET: Final = re.compile(r"[!-~]*")


@dataclass(frozen=True, slots=True)
class PictureUrl:
    """An http(s) URL in the parts that a request needs."""

    scheme: str
    host: str
    port: int
    target: str  # path and query

    @classmethod
    def parse(cls, url: str) -> PictureUrl:
        """Raises ValueError for a URL that is too long, or has a password or characters that must be escaped."""
        wrong = f"{url[:60]!r} is no plain http(s) URL of at most {_LONGEST} characters"
        if len(url) > _LONGEST:
            raise ValueError(wrong)
        parts = urlsplit(url)  # raises ValueError
        host = (parts.hostname or "").rstrip(".")
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        is_plain = "@" not in parts.netloc and "\\" not in url and _HOST.fullmatch(host) and _TARGET.fullmatch(target)
        if parts.scheme not in _PORTS or not is_plain:
            raise ValueError(wrong)
        return cls(parts.scheme, host, parts.port or _PORTS[parts.scheme], target)

    @property
    def has_default_port(self) -> bool:
        return self.port == _PORTS[self.scheme]

    @property
    def authority(self) -> str:
        return self.host if self.has_default_port else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class ImageRules:
    """The images that a model takes. `hosts`: those whose http(s) URLs are fetched, such as `example.com`,
    `*.example.com` or `example.com:8080`."""

    hosts: tuple[str, ...] = ()

    def check(self, url: str) -> None:
        """Raises ValueError for an http(s) URL that is wrong or whose host is not allowed."""
        place = PictureUrl.parse(url)
        if not any(_allows(host, place) for host in self.hosts):
            what = f"pictures are not fetched from {place.authority[:100]}"
            raise ValueError(f"{what}: send a data URL, or add the host to api.image_urls in the cluster file")


def _allows(allowed: str, url: PictureUrl) -> bool:
    name, _, port = allowed.lower().partition(":")
    if not (url.has_default_port if not port else port == str(url.port)):
        return False
    return url.host.endswith(name[1:]) if name.startswith("*.") else url.host == name


async def with_pictures(chat: ChatRequest, context: RequestContext | None = None) -> ChatRequest:
    """Returns a chat with the pictures at http(s) URLs. They are fetched once: the context keeps them, so that the
    reply can be computed again. Raises ParameterError if the images are too many or too large, RequestFailedError if
    the journal did not keep them, and errors of `fetch_pictures`."""
    urls = image_urls(chat.messages)
    if not urls:
        return chat
    if len(urls) > MAX_IMAGES:
        raise ParameterError("messages", f"have {len(urls)} images, at most {MAX_IMAGES} are taken in one request")
    pictures = dict(context.pictures) if context is not None else {}
    held_bytes = sum(map(_inline_bytes, urls)) + sum(map(len, pictures.values()))
    if held_bytes > MAX_IMAGES_BYTES:
        reason = f"have images of {held_bytes} bytes, at most {MAX_IMAGES_BYTES} are taken in one request"
        raise ParameterError("messages", reason)
    if missing := [url for url in dict.fromkeys(urls) if url.startswith(WEB) and url not in pictures]:
        from llamaclust.cluster.front.image_fetch import fetch_pictures

        pictures |= await fetch_pictures(missing, MAX_IMAGES_BYTES - held_bytes)
    if context is not None:
        context.pictures = pictures
        context.picture_bytes = held_bytes + sum(len(pictures[url]) for url in missing)
    return replace(chat, pictures=pictures)


def _inline_bytes(url: str) -> int:
    """Returns the size of the picture in a data URL; 0 for other URLs."""
    return 0 if url.startswith(WEB) else len(url.partition(",")[2]) * 3 // 4


def journalled(context: RequestContext, body: bytes) -> RequestContext:
    """Returns the record of a request with its body. If the pictures are too large for the journal, the record only
    tells a restarted coordinator that the request is lost; a repeated request is then a new one."""
    if context.picture_bytes <= MAX_JOURNALLED_BYTES:
        return replace(context, body=body)
    return replace(context, body=b"", earlier=(), pictures={}, idempotency_key="")


def check_restored(context: RequestContext) -> None:
    """Raises RequestFailedError for a restored request whose pictures the journal did not keep."""
    if context.picture_bytes > MAX_JOURNALLED_BYTES:
        what = f"its pictures have {context.picture_bytes} bytes, and the journal keeps {MAX_JOURNALLED_BYTES}"
        raise RequestFailedError(f"the coordinator was restarted, and this request is lost: {what}; send it again")

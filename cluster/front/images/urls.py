"""Image URLs, and the hosts from which images may be fetched."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

WEB: Final = ("http://", "https://")
_LONGEST: Final = 4096
_PORTS: Final = {"http": 80, "https": 443}
_HOST: Final = re.compile(r"[a-z0-9.-]{1,253}")
_TARGET: Final = re.compile(r"[!-~]*")


@dataclass(frozen=True, slots=True)
class ImageUrl:
    scheme: str
    host: str
    port: int
    target: str  # Path and query.

    @classmethod
    def parse(cls, url: str) -> ImageUrl:
        """Parses an http(s) URL. Raises ValueError if the URL is too long, invalid, or contains a password."""
        wrong = f"expected a plain http(s) URL of at most {_LONGEST} characters, found {url[:60]!r}"
        if len(url) > _LONGEST or not url.isprintable():  # `urlsplit` would silently remove line breaks.
            raise ValueError(wrong)
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError:
            raise ValueError(wrong) from None
        host = (parts.hostname or "").rstrip(".")
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        is_plain = "@" not in parts.netloc and "\\" not in url and _HOST.fullmatch(host) and _TARGET.fullmatch(target)
        if parts.scheme not in _PORTS or not is_plain:
            raise ValueError(wrong)
        return cls(parts.scheme, host, port or _PORTS[parts.scheme], target)

    @property
    def has_default_port(self) -> bool:
        return self.port == _PORTS[self.scheme]

    @property
    def authority(self) -> str:
        return self.host if self.has_default_port else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class ImageRules:
    """The hosts from which images may be fetched, such as `example.com`, `*.example.com` or `example.com:8080`."""

    hosts: tuple[str, ...] = ()

    def check(self, url: str) -> None:
        place = ImageUrl.parse(url)
        if not any(_allows(host, place) for host in self.hosts):
            what = f"expected a host of api.image_urls in the cluster file, found {place.authority[:100]}"
            raise ValueError(f"{what}; send a data URL, or add the host to `api.image_urls`")


def _allows(allowed: str, url: ImageUrl) -> bool:
    name, _, port = allowed.lower().partition(":")
    if not (url.has_default_port if not port else port == str(url.port)):
        return False
    return url.host.endswith(name[1:]) if name.startswith("*.") else url.host == name

"""The files of the page, read once; they hold no secret, need no other host and no key."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Final

_TYPES: Final = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_FOLDER: Final = Path(__file__).with_name("static")
PAGE: Final = "/"
"""The path of the page itself."""


@dataclass(frozen=True, slots=True)
class Asset:
    """A file as it is sent."""

    data: bytes
    media_type: str
    etag: str  # of its content, in quotes


@cache
def assets() -> Mapping[str, Asset]:
    """By path."""
    found = (file for file in _FOLDER.rglob("*") if file.suffix in _TYPES)
    return MappingProxyType({_path(file.relative_to(_FOLDER).as_posix()): _asset(file) for file in sorted(found)})


def _path(name: str) -> str:
    return PAGE if name == "index.html" else f"/browser/{name}"


def _asset(file: Path) -> Asset:
    data = file.read_bytes()
    return Asset(data, _TYPES[file.suffix], f'"{hashlib.sha256(data).hexdigest()[:32]}"')

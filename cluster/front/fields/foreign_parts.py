"""Parts of a chat that a text model cannot read, and what tools of other servers did: short texts in their place."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

from llamaclust.cluster.front.schema import Leniency

_MEDIA: Final = ("image", "audio", "video", "screenshot", "document", "file", "container")
"""Words in the types of parts that are no text."""
_OF_ITEMS: Final = frozenset(("type", "id", "call_id", "tool_use_id", "status", "cache_control", "caller", "signature"))
"""Fields of an item that say nothing to a model. What a tool was asked or found may have fields of the same names."""
_ENCRYPTED: Final = "encrypted_"
_BYTES: Final = ("data", "result", "image_url", "file_data")
_BASE64: Final = re.compile(r"(data:[^,]*,)?[A-Za-z0-9+/_=\s-]*")
_MOST_CHARACTERS: Final = 4000


def is_media(kind: str) -> bool:
    """Returns whether parts of this type are pictures, sound or files."""
    return any(word in kind for word in _MEDIA)


def media_text(kind: str, context: object) -> str:
    """The text in place of a part. ValueError unless `context`, that of validation, is a `Leniency`."""
    word = next(word for word in _MEDIA if word in kind)
    if not isinstance(context, Leniency):
        raise ValueError(f"{word} input is not supported by this server; leave it out")
    context.ignore(f"content.{kind}")
    return f"[{word} left out: this model reads text only]"


def leave_out(place: str, kind: str, context: object) -> None:
    """Names a tool or an item that has no effect. ValueError as of `media_text`."""
    if not isinstance(context, Leniency):
        raise ValueError(f"{kind[:60]!r} is not supported by this server; leave it out")
    context.ignore(f"{place}.{kind}")


def tool_text(kind: str, fields: Mapping[str, Any]) -> str:
    """Returns a text of what another server's tool was asked or found, without what only that server can read."""
    return f"[{kind}: {item_text(fields)}]"


def item_text(item: Mapping[str, Any]) -> str:
    """JSON of an item without its own fields that say nothing to a model, cut where it is long."""
    kept = {name: _readable(value) for name, value in _without_bytes(item) if name not in _OF_ITEMS}
    return _cut({name: value for name, value in kept.items() if value not in (None, [], {})})


def readable(value: Any) -> str:
    """JSON of a value without encrypted texts and the bytes of media, cut where it is long."""
    return _cut(_readable(value))


def _cut(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _MOST_CHARACTERS else text[:_MOST_CHARACTERS] + "..."


def _readable(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _readable(item) for name, item in _without_bytes(value)}
    return [_readable(item) for item in value] if isinstance(value, list) else value


def _without_bytes(fields: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Fields of an object that are neither encrypted nor, where it is a picture, sound or a file, base64."""
    kind = str(fields.get("type"))
    has_media = kind == "base64" or is_media(kind)
    for name, value in fields.items():
        is_base64 = has_media and name in _BYTES and isinstance(value, str) and _BASE64.fullmatch(value)
        if not is_base64 and not name.startswith(_ENCRYPTED):
            yield name, value

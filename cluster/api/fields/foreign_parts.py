"""Parts of a chat that a text model cannot read, and what tools of other servers did: short texts in their place."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from llamaclust.cluster.api.schema import Leniency

_MEDIA: Final = ("image", "audio", "video", "screenshot", "document", "file", "container")
"""Words in the types of parts that are no text."""
_HOW: Final = ("type", "id", "call_id", "tool_use_id", "status", "cache_control", "caller", "signature")
_WHAT: Final = ("data", "result", "image_url", "file_data", "encrypted_content", "encrypted_index")
_UNREADABLE: Final = frozenset({*_HOW, *_WHAT})
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
    return f"[{kind}: {readable(fields)}]"


def readable(value: Any) -> str:
    """JSON of a value, cut where it is long."""
    text = json.dumps(_readable(value), ensure_ascii=False)
    return text if len(text) <= _MOST_CHARACTERS else text[:_MOST_CHARACTERS] + "..."


def _readable(value: Any) -> Any:
    if isinstance(value, dict):
        kept = {name: _readable(item) for name, item in value.items() if name not in _UNREADABLE}
        return {name: item for name, item in kept.items() if item not in (None, [], {})}
    return [_readable(item) for item in value] if isinstance(value, list) else value

"""The content of a chat's message: text, or parts that are put together as text."""

from __future__ import annotations

from typing import Annotated, Any, Final

from pydantic import BeforeValidator, ValidationInfo, WithJsonSchema

from llamaclust.cluster.front.fields.foreign_parts import is_media, media_text

_PARTS: Final = {"type": "array", "items": {"type": "object", "required": ["type"]}}


def _content(value: Any, info: ValidationInfo) -> str:
    """Parts are put on lines of their own."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError("must be a string or a list of parts")
    return "\n".join(_part(part, info.context) for part in value)


def _part(part: Any, context: object) -> str:
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        raise ValueError("a part must be an object with a 'type'")
    kind = part["type"]
    if is_media(kind):
        return media_text(kind, context)
    field = "refusal" if kind == "refusal" else "text"
    if kind not in ("text", "refusal"):
        raise ValueError(f"parts of type {kind[:60]!r} are not supported, only 'text'")
    if not isinstance(part.get(field), str):
        raise ValueError(f"a {kind} part needs the field {field!r}")
    return str(part[field])


ContentField = Annotated[str, BeforeValidator(_content), WithJsonSchema({"anyOf": [{"type": "string"}, _PARTS]})]

"""Tools in requests of all APIs, and short texts that replace parts of messages that a text model cannot read."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Final

from llamaclust.cluster.front.schema import LenientContext, takes_images
from llamaclust.cluster.front.text.images import Omission
from llamaclust.model.chat.tools.argument_values import arguments_object

_MEDIA: Final = ("image", "audio", "video", "screenshot", "document", "file", "container")
"""A part of a message is media if its type contains one of these words."""
_OF_ITEMS: Final = frozenset(("type", "id", "call_id", "tool_use_id", "status", "cache_control", "caller", "signature"))
"""Fields that tell the model nothing. They are removed from an item, but not from objects inside the item."""
_ENCRYPTED: Final = "encrypted_"
_BYTES: Final = ("data", "result", "image_url", "file_data")
_BASE64: Final = re.compile(r"(data:[^,]*,)?[A-Za-z0-9+/_=\s-]*")
_MOST_CHARACTERS: Final = 4000


def is_media(kind: str) -> bool:
    return any(word in kind for word in _MEDIA)


def is_image(kind: str) -> bool:
    return "image" in kind or "screenshot" in kind


def media_text(kind: str, context: object) -> Omission:
    """Returns the text that replaces a media part. Raises ValueError unless `context` is a `LenientContext`."""
    word = next(word for word in _MEDIA if word in kind)
    if not isinstance(context, LenientContext):
        raise ValueError(f"{word} input is not supported by this server; remove it")
    context.ignore(f"content.{kind}")
    if not takes_images(context):
        reason = "this model reads text only"
    elif is_image(kind):
        reason = "images are not read in this place"
    else:
        reason = "this model reads text and images only"
    return Omission(f"[{word} omitted: {reason}]")


def leave_out(place: str, kind: str, context: object) -> None:
    """Reports a tool or an item as ignored. Raises ValueError unless `context` is a `LenientContext`."""
    if not isinstance(context, LenientContext):
        raise ValueError(f"{kind[:60]!r} is not supported by this server; remove it")
    context.ignore(f"{place}.{kind}")


def tool_text(kind: str, fields: Mapping[str, Any]) -> str:
    """Shows arguments or results of another server's tool as text, without the parts that only that server can read."""
    return f"[{kind}: {item_text(fields)}]"


def item_text(item: Mapping[str, Any]) -> str:
    """Returns an item as JSON of at most 4,000 characters, without ids, encrypted texts and media bytes."""
    kept = {name: _readable(value) for name, value in _without_bytes(item) if name not in _OF_ITEMS}
    return _cut({name: value for name, value in kept.items() if value not in (None, [], {})})


def readable(value: Any) -> str:
    return _cut(_readable(value))


def _cut(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _MOST_CHARACTERS else text[:_MOST_CHARACTERS] + "..."


def _readable(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _readable(item) for name, item in _without_bytes(value)}
    return [_readable(item) for item in value] if isinstance(value, list) else value


def _without_bytes(fields: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    kind = str(fields.get("type"))
    has_media = kind == "base64" or is_media(kind)
    for name, value in fields.items():
        is_base64 = has_media and name in _BYTES and isinstance(value, str) and _BASE64.fullmatch(value)
        if not is_base64 and not name.startswith(_ENCRYPTED):
            yield name, value


MAX_TOOLS: Final = 1024
TEXT_ARGUMENT: Final = "input"
_BETWEEN: Final = "__"
_NAME: Final = re.compile(r"[\w.\-/:]{1,128}")
_ID_CHARACTERS: Final = 24
_OBJECTS: Final = frozenset({"properties", "patternProperties", "$defs", "definitions"})
_VALUES: Final = frozenset({"default", "const", "enum", "examples"})
"""The value of a key in `_OBJECTS` maps names to JSON schemas. The value of a key in `_VALUES` is not a schema."""
_NO_PARAMETERS: Final = {"type": "object", "properties": {}}


@dataclass(frozen=True, slots=True)
class ClientTool:
    kind: str  # Type of the tool: function, custom, or a built-in type such as shell.
    name: str  # Name that the client uses.
    function: dict[str, Any]  # OpenAI's definition, which the model gets.
    namespace: str | None = None

    @property
    def function_name(self) -> str:
        return str(self.function["function"]["name"])

    def is_named_by(self, choice: Mapping[str, Any]) -> bool:
        named = choice["type"], choice.get("name", choice["type"]), choice.get("namespace")
        return named == (self.kind, self.name, self.namespace)


def function_tool(function: Mapping[str, Any], place: str = "", parameters: str = "parameters") -> dict[str, Any]:
    """Returns a function in OpenAI's form. Raises ValueError with a message that begins with `place`."""
    if not isinstance(function.get("name"), str) or not _NAME.fullmatch(function["name"]):
        raise ValueError(f"{place}name: must have 1 to 128 characters: letters, digits or _.-/:")
    if not isinstance(function.get(parameters) or {}, dict):
        raise ValueError(f"{place}{parameters}: must be an object with a JSON schema")
    if not isinstance(function.get("description") or "", str):
        raise ValueError(f"{place}description: must be a string")
    made = {"name": function["name"], "description": function.get("description") or ""}
    return {
        "type": "function",
        "function": {**made, "parameters": with_objects(function.get(parameters)) or _NO_PARAMETERS},
    }


def with_objects(schema: Any) -> Any:
    """Replaces [] by {} in a JSON schema wherever an object is required, because PHP writes {} as []."""
    if isinstance(schema, list):
        return [with_objects(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: value if key in _VALUES else with_objects(value) for key, value in schema.items()}
    for key in _OBJECTS & made.keys():
        if isinstance(of_names := made[key] or {}, dict):
            made[key] = {name: {} if part == [] else part for name, part in of_names.items()}
    return made


def present(tools: list[Any]) -> list[Any]:
    return [tool for tool in tools if tool is not None]


def flat_name(namespace: str | None, name: str) -> str:
    """Returns the name that the model uses for a function: NAMESPACE__NAME, or NAME without a namespace."""
    return name if namespace is None else f"{namespace}{_BETWEEN}{name}"


def text_tool(tool: Mapping[str, Any], context: object) -> dict[str, Any]:
    """Converts a custom tool to a function with one text argument. Raises ValueError for an invalid `format`."""
    text: dict[str, Any] = {"type": "string"}
    description = tool.get("description") or ""
    form = tool.get("format")
    if isinstance(form, dict) and form.get("type") == "grammar":
        # Chat completions nest `syntax` and `definition` in an object `grammar`.
        grammar = form.get("grammar", form)
        syntax, definition = map(grammar.get, ("syntax", "definition")) if isinstance(grammar, dict) else (None, None)
        if syntax not in ("lark", "regex") or not isinstance(definition, str):
            raise ValueError("format: a grammar must have a 'syntax' of lark or regex and a 'definition'")
        if syntax == "regex":
            text["pattern"] = f"^(?:{definition})$"
        else:
            leave_out("tools", "custom.format", context)
            description = f"{description}\n\nThe {TEXT_ARGUMENT} obeys this Lark grammar:\n{definition}".strip()
    schema = {"type": "object", "properties": {TEXT_ARGUMENT: text}, "required": [TEXT_ARGUMENT]}
    return {"name": tool.get("name"), "description": description, "parameters": schema}


def text_of_call(arguments: str) -> str:
    """Returns the text argument of a custom tool's call, or `arguments` unchanged if they are invalid."""
    given = arguments_object(arguments)
    text = "" if given == {} else (given or {}).get(TEXT_ARGUMENT)
    return text if isinstance(text, str) else arguments


def arguments_of_text(text: str) -> str:
    return json.dumps({TEXT_ARGUMENT: text}, ensure_ascii=False)


def call_id_of(choice_id: str, index: int, prefix: str = "call_") -> str:
    """Returns an id for a tool call that has none. The id is the same if the reply is computed again."""
    return f"{prefix}{sha256(f'{choice_id} {index}'.encode()).hexdigest()[:_ID_CHARACTERS]}"

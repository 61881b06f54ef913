"""Validates the Responses API's items, and converts them to chat messages."""

from __future__ import annotations

import json
from base64 import b64decode, b64encode
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, groupby
from typing import Any, Final

from llamaclust.cluster.front.dialects.openai.tools import BUILT_IN, read_tools
from llamaclust.cluster.front.images.parts import media_part, placed
from llamaclust.cluster.front.schema import LenientContext
from llamaclust.cluster.front.sent_thoughts import sent_thoughts
from llamaclust.cluster.front.text.images import Content, Part, image_part, joined, parts_of
from llamaclust.cluster.front.tools import (
    arguments_of_text,
    flat_name,
    is_media,
    item_text,
    leave_out,
    media_text,
    readable,
    tool_text,
)

Item = dict[str, Any]

MAX_ITEMS: Final = 16_384
REFERENCE: Final = "item_reference"
"""The type of input items that refer to an item in a stored response. The reference has that item's id."""
CALL_TEXTS: Final = {"function_call": "arguments", "custom_tool_call": "input"}
"""Maps the types of tool-call items to the field that holds the text written by the model."""
_ROLES: Final = {"user": "user", "assistant": "assistant", "system": "system", "developer": "system"}
_SUMMARY_FORMAT: Final = "llamaclust summary 1:"
_SUMMARY: Final = "Summary of the conversation so far:"
_UNREADABLE_SUMMARY: Final = "(The conversation before was summarized by another server and cannot be read.)"
_CALL: Final = "_call"
_SEARCH: Final = "tool_search"
ADDITIONAL: Final = "additional_tools"
_TOOL_HOLDERS: Final = (ADDITIONAL, f"{_SEARCH}_output")
TOOLS: Final = "tools"
"""The role of a chat's entries that hold tools, which the request offers besides its own."""
_OUTPUT: Final = "_output"
_STRINGS: Final = {
    REFERENCE: ("id",),
    "compaction": ("encrypted_content",),
    **{kind: ("call_id", "name", text) for kind, text in CALL_TEXTS.items()},
}
"""Required string fields of an item, by the item's type."""
IMAGE: Final = "input_image"
_TEXTS: Final = ("input_text", "output_text", "text")
_THOUGHTS: Final = ("summary_text", "reasoning_text", "text")


def read_items(value: Any, context: object) -> list[Item]:
    """Converts the field `input` to items. Raises ValueError if an item is invalid."""
    if isinstance(value, str):
        return [_message({"role": "user", "content": value}, context)]
    if not isinstance(value, list):
        raise ValueError("must be a string or a list of items")
    if len(value) > MAX_ITEMS:
        raise ValueError(f"the input has {len(value)} items; the limit is {MAX_ITEMS}")
    items = []
    for place, item in enumerate(value):
        try:
            items += _items(item, context)
        except ValueError as error:
            raise ValueError(f"[{place}]: {error}") from error
    return items


def has_references(items: Iterable[Item]) -> bool:
    return any(item["type"] == REFERENCE for item in items)


def with_ids(items: Sequence[Item], response_id: str) -> list[Item]:
    return [{**item, "id": item.get("id") or f"item_{response_id}{place}"} for place, item in enumerate(items)]


def summary_item(item_id: str, summary: str) -> Item:
    """Returns a compaction item, which replaces all earlier messages. `encrypted_content` is the summary in base64."""
    content = _SUMMARY_FORMAT + b64encode(summary.encode()).decode()
    return {"type": "compaction", "id": item_id, "encrypted_content": content}


def messages_of(items: Iterable[Item]) -> list[dict[str, Any]]:
    """Converts items to chat messages. Successive reasoning, text and calls of the assistant become one message."""
    messages: list[dict[str, Any]] = []
    for is_answer, group in groupby(items, _is_answer):
        run = [*group]
        messages += [_answer(run)] if is_answer else chain.from_iterable(map(_other_messages, run))
    return messages


def without_tools(messages: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Removes the entries that hold the tools of a chat."""
    return [message for message in messages if message["role"] != TOOLS]


def _is_answer(item: Item) -> bool:
    is_message = item["type"] == "message" and item["role"] == "assistant"
    return is_message or item["type"] == "reasoning" or str(item["type"]).endswith(_CALL)


def _answer(items: Iterable[Item]) -> dict[str, Any]:
    parts, thoughts, calls = list[Part](), list[str](), list[dict[str, Any]]()
    for item in items:
        if item["type"] == "message":
            parts += parts_of(_content_of(item["content"]))
        elif item["type"] == "reasoning":
            thoughts.append(sent_thoughts(item.get("content") or item.get("summary") or ""))
        elif isinstance(item.get("call_id"), str):
            calls.append({"id": item["call_id"], "type": "function", "function": _function(item)})
        else:  # The call has no id, because another server ran the tool.
            parts.append(tool_text(item["type"], item))
    more = {"reasoning_content": "\n".join(filter(None, thoughts)), "tool_calls": calls}
    given = {name: value for name, value in more.items() if value}
    return {"role": "assistant", "content": joined(parts), **given}


def _function(item: Item) -> dict[str, str]:
    kind = str(item["type"])
    if kind in CALL_TEXTS:
        text = item[CALL_TEXTS[kind]]
        arguments = text if kind == "function_call" else arguments_of_text(text)
        return {"name": flat_name(item.get("namespace"), item["name"]), "arguments": arguments}
    name = kind.removesuffix(_CALL)
    if (built_in := BUILT_IN.get(name)) is None:
        return {"name": name, "arguments": item_text(item)}
    keys = built_in.properties if built_in.fixed else item[built_in.field]
    given = {key: value for key in keys if (value := item[built_in.field].get(key)) is not None}
    return {"name": name, "arguments": json.dumps(given, ensure_ascii=False)}


def tools_of(item: Item) -> list[Item]:
    """Returns the tools that an item offers besides those of the request."""
    return item["tools"] if item["type"] in _TOOL_HOLDERS else []


def _other_messages(item: Item) -> Iterator[dict[str, Any]]:
    if item["type"] != ADDITIONAL:
        yield _other_message(item)
    if tools_of(item):
        yield {"role": TOOLS, "tools": item["tools"]}


def _other_message(item: Item) -> dict[str, Any]:
    if str(item["type"]).endswith(_OUTPUT):
        return {"role": "tool", "tool_call_id": item["call_id"], "content": _content_of(item["output"])}
    if item["type"] == "compaction":
        return {"role": "system", "content": f"{_SUMMARY}\n{_summary(item)}"}
    return {"role": _ROLES[item["role"]], "content": _content_of(item["content"])}


def _content_of(content: str | list[Item]) -> Content:
    return content if isinstance(content, str) else joined([_chat_part(part) for part in content])


def _chat_part(part: Item) -> Part:
    if part["type"] == IMAGE:
        return image_part(part["image_url"], part["detail"])
    text: str = part["text"]
    return text


def _items(value: Any, context: object) -> list[Item]:
    if not isinstance(value, dict):
        raise ValueError("an item must be an object")
    kind = value.get("type") or ("message" if "role" in value or "id" not in value else REFERENCE)
    match kind:
        case "message":
            return [_message(value, context)]
        case "item_reference":
            return [_item(kind, value)]
        case "reasoning":
            names = ("summary", "content")
            return [_item(kind, value, **{name: _parts(value.get(name) or [], context, _THOUGHTS) for name in names})]
        case "compaction":
            return [_compaction(_item(kind, value), context)]
        case str() if kind.endswith(_CALL):
            return [_call(kind, value, context)]
        case str() if kind.endswith(_OUTPUT):
            call_id = _string(value, "id" if value.get("call_id") is None else "call_id")
            found = {"tools": _tools(value, context)} if kind == f"{_SEARCH}{_OUTPUT}" else {}
            return [_item(kind, value, call_id=call_id, output=_output(kind, value, context), **found)]
        case "additional_tools":
            return [_item(kind, value, role="developer", tools=_tools(value, context))]
    if not isinstance(kind, str) or "content" in value:
        raise ValueError(f"items of type {str(kind)[:60]!r} are not supported")
    leave_out("input", kind, context)
    return []


def _tools(value: Item, context: object) -> list[Item]:
    tools = value.get("tools") or []
    try:
        read_tools(tools, context)
    except ValueError as error:
        raise ValueError(f"tools: {error}") from error
    return [*tools]


def _item(kind: str, value: Item, **more: Any) -> Item:
    item_id = {"id": value["id"]} if isinstance(value.get("id"), str) else {}
    return {"type": kind, **item_id, **{name: _string(value, name) for name in _STRINGS.get(kind, ())}, **more}


def _call(kind: str, value: Item, context: object) -> Item:
    if kind in CALL_TEXTS:
        space = {"namespace": _string(value, "namespace")} if value.get("namespace") is not None else {}
        return _item(kind, value, **space, status="completed")
    built_in = BUILT_IN.get(kind.removesuffix(_CALL))
    if built_in is not None and not isinstance(value.get(built_in.field), dict):
        raise ValueError(f"{built_in.field}: must be an object")
    if built_in is None and not isinstance(context, LenientContext):
        leave_out("input", kind, context)
    return {name: part for name, part in value.items() if name != "id" or isinstance(part, str)} | {"type": kind}


def _output(kind: str, value: Item, context: object) -> str | list[Item]:
    """Returns a tool call's result as a text or as parts."""
    is_text = kind.removesuffix(_OUTPUT) in CALL_TEXTS
    output = value.get("output") or ("" if is_text else None)
    if isinstance(output, str):
        return output
    if is_text or (isinstance(output, list) and all(_is_part(part) for part in output)):
        return _parts(output, context)
    inner = output.get("type") if isinstance(output, dict) else None
    if isinstance(output, dict) and isinstance(inner, str) and is_media(inner):
        return [_media(output, context)]
    rest = {name: item for name, item in value.items() if name != "output"}
    return item_text(rest) if output is None else readable(output)


def _is_part(part: Any) -> bool:
    kind = part.get("type") if isinstance(part, dict) else None
    return isinstance(kind, str) and (kind in _TEXTS or is_media(kind))


def _compaction(item: Item, context: object) -> Item:
    """Validates a compaction item. If `context` is a `LenientContext`, replaces another server's summary by a note."""
    try:
        _summary(item)
    except ValueError:
        if not isinstance(context, LenientContext) or _SUMMARY_FORMAT in item["encrypted_content"]:
            raise
        leave_out("input", "compaction", context)
        return _message({**item, "role": "system", "content": _UNREADABLE_SUMMARY}, context)
    return item


def _summary(item: Item) -> str:
    kind, summary_format, encoded = item["encrypted_content"].rpartition(_SUMMARY_FORMAT)
    try:
        summary = b64decode(encoded, validate=True).decode()
    except ValueError:  # The text is not valid base64, or not UTF-8.
        summary = ""
    if kind or not summary_format or not summary:
        raise ValueError("encrypted_content: the text was not made by this server's /v1/responses/compact")
    return summary


def _message(value: Item, context: object) -> Item:
    role, content = value.get("role"), value.get("content")
    if not isinstance(role, str) or role not in _ROLES:
        raise ValueError(f"role: must be one of {', '.join(_ROLES)}")
    kind = "output_text" if role == "assistant" else "input_text"
    parts = [{"type": kind, "text": content}] if isinstance(content, str) else _parts(content, context)
    return _item("message", value, role=role, status="completed", content=parts)


def _parts(value: Any, context: object, kinds: Sequence[str] = _TEXTS) -> list[Item]:
    if not isinstance(value, list):
        raise ValueError("must be a string or a list of parts")
    return [_part(place, part, context, kinds) for place, part in enumerate(value)]


def _part(place: int, part: Any, context: object, kinds: Sequence[str]) -> Item:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "refusal":
        return {"type": "output_text", "text": _string(part, "refusal")}
    if isinstance(kind, str) and is_media(kind):
        is_read = kinds == _TEXTS
        return placed(f"content[{place}]", _media, part, context) if is_read else _text(media_text(kind, context))
    if kind not in kinds:
        raise ValueError(f"parts of type {str(kind)[:60]!r} are not supported")
    return {"type": kind, "text": _string(part, "text")}


def _media(value: Item, context: object) -> Item:
    part = media_part(value, context)
    if isinstance(part, str):
        return _text(part)
    return {"type": IMAGE, "detail": part["image_url"]["detail"], "image_url": part["image_url"]["url"]}


def _text(text: str) -> Item:
    return {"type": "input_text", "text": text}


def _string(value: Item, name: str) -> str:
    if not isinstance(value.get(name), str):
        raise ValueError(f"{name}: must be a string")
    return str(value[name])

"""Items of the Responses API as messages of a chat."""

from __future__ import annotations

from base64 import b64decode, b64encode
from collections.abc import Iterable, Sequence
from typing import Any, Final

Item = dict[str, Any]

MAX_ITEMS: Final = 16_384
REFERENCE: Final = "item_reference"
"""The type of an item that stands for one of a stored response, by its id."""
_ROLES: Final = {"user": "user", "assistant": "assistant", "system": "system", "developer": "system"}
_SUMMARY_FORMAT: Final = "llamaclust summary 1:"
_SUMMARY: Final = "Summary of the conversation so far:"
_NOT_ANSWERS: Final = ("function_call_output", "compaction")
_TEXT_PARTS: Final = ("input_text", "output_text", "text")
_REASONING_PARTS: Final = ("summary_text", "reasoning_text", "text")


def read_items(value: Any) -> list[Item]:
    """The input of a request, in full form. ValueError for one that is wrong or has parts that are not supported."""
    if isinstance(value, str):
        return [_message({"role": "user", "content": value})]
    if not isinstance(value, list):
        raise ValueError("must be a string or a list of items")
    if len(value) > MAX_ITEMS:
        raise ValueError(f"{len(value)} items, at most {MAX_ITEMS} are taken")
    items = []
    for place, item in enumerate(value):
        try:
            items.append(_item(item))
        except ValueError as error:
            raise ValueError(f"[{place}]: {error}") from error
    return items


def has_references(items: Iterable[Item]) -> bool:
    """Whether some stand for items of stored responses."""
    return any(item["type"] == REFERENCE for item in items)


def with_ids(items: Sequence[Item], response_id: str) -> list[Item]:
    """As a client lists them: those without an id get one."""
    return [{**item, "id": item.get("id") or f"item_{response_id}{place}"} for place, item in enumerate(items)]


def summary_item(item_id: str, summary: str) -> Item:
    """Stands for all messages before it. Its client may read it: it is base64, in the field's name of the API."""
    content = _SUMMARY_FORMAT + b64encode(summary.encode()).decode()
    return {"type": "compaction", "id": item_id, "encrypted_content": content}


def messages_of(items: Iterable[Item]) -> list[dict[str, Any]]:
    """Successive items of an assistant (reasoning, text, calls) are one message."""
    messages: list[dict[str, Any]] = []
    answer: _Answer | None = None
    for item in items:
        if item["type"] in _NOT_ANSWERS or item.get("role", "assistant") != "assistant":
            messages += [] if answer is None else [answer.message()]
            answer = None
            messages.append(_other_message(item))
        else:
            answer = answer or _Answer()
            answer.add(item)
    return messages if answer is None else [*messages, answer.message()]


class _Answer:
    """An assistant's message, put together from its items."""

    def __init__(self) -> None:
        self._texts: list[str] = []
        self._thoughts: list[str] = []
        self._calls: list[dict[str, Any]] = []

    def add(self, item: Item) -> None:
        match item["type"]:
            case "message":
                self._texts.append(text_of(item))
            case "reasoning":
                parts = item.get("content") or item.get("summary") or ()
                self._thoughts += [part["text"] for part in parts]
            case "function_call":
                function = {"name": item["name"], "arguments": item["arguments"]}
                self._calls.append({"id": item["call_id"], "type": "function", "function": function})

    def message(self) -> dict[str, Any]:
        more = {"reasoning_content": "\n".join(self._thoughts), "tool_calls": self._calls}
        given = {name: value for name, value in more.items() if value}
        return {"role": "assistant", "content": "\n".join(self._texts), **given}


def text_of(item: Item) -> str:
    """Of a message or a result."""
    content = item["output"] if item["type"] == "function_call_output" else item["content"]
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)


def _other_message(item: Item) -> dict[str, Any]:
    if item["type"] == "function_call_output":
        return {"role": "tool", "tool_call_id": item["call_id"], "content": text_of(item)}
    if item["type"] == "compaction":
        return {"role": "system", "content": f"{_SUMMARY}\n{_summary(item)}"}
    return {"role": _ROLES[item["role"]], "content": text_of(item)}


def _item(value: Any) -> Item:
    if not isinstance(value, dict):
        raise ValueError("an item must be an object")
    kind = value.get("type") or ("message" if "role" in value or "id" not in value else REFERENCE)
    match kind:
        case "message":
            return _message(value)
        case "function_call":
            call = {name: _text(value, name) for name in ("call_id", "name", "arguments")}
            return {"type": kind, **_id(value), **call, "status": "completed"}
        case "function_call_output":
            output = value.get("output")
            shown = output if isinstance(output, str) else _parts(output, _TEXT_PARTS)
            return {"type": kind, **_id(value), "call_id": _text(value, "call_id"), "output": shown}
        case "item_reference":
            return {"type": kind, "id": _text(value, "id")}
        case "reasoning":
            summary = _parts(value.get("summary") or [], _REASONING_PARTS)
            content = _parts(value.get("content") or [], _REASONING_PARTS)
            return {"type": kind, **_id(value), "summary": summary, "content": content}
        case "compaction":
            item = {"type": kind, **_id(value), "encrypted_content": _text(value, "encrypted_content")}
            _summary(item)
            return item
    raise ValueError(f"items of type {str(kind)[:60]!r} are not supported")


def _summary(item: Item) -> str:
    """ValueError where another server made it, and for an empty one."""
    kind, summary_format, encoded = item["encrypted_content"].rpartition(_SUMMARY_FORMAT)
    try:
        summary = b64decode(encoded, validate=True).decode()
    except ValueError:  # of base64 or UTF-8
        summary = ""
    if kind or not summary_format or not summary:
        raise ValueError("encrypted_content: was not made by this server's /v1/responses/compact")
    return summary


def _message(value: dict[str, Any]) -> Item:
    role, content = value.get("role"), value.get("content")
    if not isinstance(role, str) or role not in _ROLES:
        raise ValueError(f"role: must be one of {', '.join(_ROLES)}")
    kind = "output_text" if role == "assistant" else "input_text"
    parts = [{"type": kind, "text": content}] if isinstance(content, str) else _parts(content, _TEXT_PARTS)
    return {"type": "message", **_id(value), "role": role, "status": "completed", "content": parts}


def _parts(value: Any, kinds: Sequence[str]) -> list[Item]:
    if not isinstance(value, list):
        raise ValueError("must be a string or a list of parts")
    return [_part(part, kinds) for part in value]


def _part(part: Any, kinds: Sequence[str]) -> Item:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "refusal":
        return {"type": "output_text", "text": _text(part, "refusal")}
    if kind == "input_image":
        raise ValueError("image input is not supported by this server; leave it out")
    if kind not in kinds:
        raise ValueError(f"parts of type {str(kind)[:60]!r} are not supported")
    return {"type": kind, "text": _text(part, "text")}


def _text(value: dict[str, Any], name: str) -> str:
    if not isinstance(value.get(name), str):
        raise ValueError(f"{name}: must be a string")
    return str(value[name])


def _id(value: dict[str, Any]) -> dict[str, str]:
    return {"id": value["id"]} if isinstance(value.get("id"), str) else {}

"""Anthropic's messages and system prompts as chat templates know them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Final

from pydantic import ValidationInfo

from llamaclust.cluster.front.fields.foreign_parts import is_media, leave_out, media_text, tool_text

_BILLING: Final = re.compile(r"x-anthropic-billing-header:(?:[ \t]*\w+=[^;\s]*(?:;|(?=\n)|\Z))*[ \t]*\n?")
"""What Claude Code puts before its system prompt. It differs from request to request, so no prompt behind it would be
found in the prefix cache; it says nothing to the model."""
_ROLES: Final = ("user", "assistant", "system")
_ERROR: Final = "Error: "


@dataclass(frozen=True, slots=True)
class Turn:
    """What one side says before the other one does."""

    role: str
    texts: tuple[str, ...] = ()
    thoughts: tuple[str, ...] = ()  # of an assistant
    calls: tuple[dict[str, Any], ...] = ()  # of an assistant, in OpenAI's form
    results: tuple[dict[str, Any], ...] = ()  # of a user: messages of role tool

    @classmethod
    def of(cls, role: str, parts: Iterable[Turn]) -> Turn:
        """The parts as one."""
        parts = [*parts]
        return cls(
            role,
            tuple(text for part in parts for text in part.texts),
            tuple(thought for part in parts for thought in part.thoughts),
            tuple(call for part in parts for call in part.calls),
            tuple(result for part in parts for result in part.results),
        )

    def messages(self) -> Iterator[dict[str, Any]]:
        """Results come first: they answer the calls of the turn before."""
        yield from self.results
        text = "\n".join(self.texts)
        if self.role == "assistant":
            more = {"reasoning_content": "\n".join(self.thoughts), "tool_calls": [*self.calls]}
            yield {"role": self.role, "content": text, **{name: value for name, value in more.items() if value}}
        elif self.texts or not self.results:
            yield {"role": self.role, "content": text}


def read_turn(message: Any, info: ValidationInfo) -> Turn:
    """The turn of one message. ValueError for one that is wrong. Texts stand in place of blocks that are not supported;
    unless the context is a `Leniency`, these are a ValueError too."""
    if not isinstance(message, dict) or message.get("role") not in _ROLES:
        raise ValueError(f"a message must be an object with a 'role' of {', '.join(_ROLES)}")
    role, content = message["role"], message.get("content")
    if isinstance(content, str):
        return Turn(role, (content,))
    if not isinstance(content, list):
        raise ValueError("content: must be a string or a list of blocks")
    parts = []
    for place, block in enumerate(content):
        try:
            parts.append(_block(role, block, info.context))
        except ValueError as error:
            raise ValueError(f"content[{place}]: {error}") from error
    return Turn.of(role, parts)


def merged_turns(turns: Iterable[Turn]) -> list[Turn]:
    """As Anthropic's API: successive messages of one role are one turn."""
    return [Turn.of(role, parts) for role, parts in groupby(turns, lambda turn: turn.role)]


def read_system(value: Any, info: ValidationInfo) -> str:
    """The text of a system prompt, without billing headers. ValueError for another form."""
    blocks = [{"type": "text", "text": value}] if isinstance(value, str) else value
    if not isinstance(blocks, list):
        raise ValueError("must be a string or a list of text blocks")
    texts = (_without_billing(text) for text in _texts(blocks, info.context))
    return "\n".join(text for text in texts if text)


def _without_billing(text: str) -> str:
    header = _BILLING.match(text)
    return text if header is None else text[header.end() :]


def _block(role: str, block: Any, context: object) -> Turn:
    kind = block.get("type") if isinstance(block, dict) else None
    if not isinstance(kind, str):
        raise ValueError("a block must be an object with a 'type'")
    match role, kind:
        case _, "text":
            return Turn(role, texts=(_text(block, "text"),))
        case "assistant", "thinking":
            return Turn(role, thoughts=(_text(block, "thinking"),))
        case "assistant", "redacted_thinking":  # of another model, which alone could read it
            return Turn(role)
        case "assistant", "tool_use":
            return Turn(role, calls=(_call(block),))
        case "user", "tool_result":
            return Turn(role, results=(_result(block, context),))
        case "assistant", _ if kind.endswith(("_tool_use", "_tool_result")):  # of another server's tool
            leave_out("content", kind, context)
            return Turn(role, texts=(tool_text(kind, block),))
    return Turn(role, texts=(_text_of(block, context),))


def _text_of(block: Any, context: object) -> str:
    """The text of a block outside an assistant's answer, or what stands in its place."""
    kind = block.get("type") if isinstance(block, dict) else None
    if kind == "text":
        return _text(block, "text")
    if kind == "tool_reference":  # a tool that a search found; all of them are offered
        return _text(block, "tool_name")
    if kind == "search_result":
        return "\n".join(
            [*(str(block.get(name) or "") for name in ("title", "source")), *_texts(block.get("content"), context)]
        )
    source = block.get("source") if kind == "document" else None
    if isinstance(source, dict) and source.get("type") == "text":
        return _text(source, "data")
    if isinstance(source, dict) and source.get("type") == "content":
        content = source.get("content")
        return content if isinstance(content, str) else "\n".join(_texts(content, context))
    if isinstance(kind, str) and is_media(kind):
        return media_text(kind, context)
    raise ValueError(f"blocks of type {str(kind)[:60]!r} are not supported here")


def _call(block: dict[str, Any]) -> dict[str, Any]:
    arguments = block.get("input") or {}
    if not isinstance(arguments, dict):
        raise ValueError("input: must be an object")
    function = {"name": _text(block, "name"), "arguments": json.dumps(arguments, ensure_ascii=False)}
    return {"id": _text(block, "id"), "type": "function", "function": function}


def _result(block: dict[str, Any], context: object) -> dict[str, Any]:
    content = block.get("content") or ""
    text = content if isinstance(content, str) else "\n".join(_texts(content, context))
    if block.get("is_error") is True:
        text = _ERROR + text
    return {"role": "tool", "tool_call_id": _text(block, "tool_use_id"), "content": text}


def _texts(blocks: Any, context: object) -> list[str]:
    if not isinstance(blocks, list):
        raise ValueError("content: must be a string or a list of blocks")
    return [_text_of(block, context) for block in blocks]


def _text(block: dict[str, Any], name: str) -> str:
    if not isinstance(block.get(name), str):
        raise ValueError(f"{name}: must be a string")
    return str(block[name])

"""Thoughts of earlier answers, in the forms that chat templates read. A message has them as `reasoning_content`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from llamaclust.model.chat.tools.tool_format import ToolFormat

THOUGHTS: Final = "reasoning_content"
NAMES: Final = (THOUGHTS, "reasoning", "thinking", "thought")
"""Names under which chat templates read the thoughts of a message."""

Message = Mapping[str, Any]


def named_thoughts(thoughts: str) -> dict[str, Any]:
    return dict.fromkeys(NAMES, thoughts)


def thought_parts(thoughts: str, content: Any) -> list[Any]:
    """Returns a message's content as parts that begin with its thoughts."""
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else [*content]
    return [
        {"type": "thinking", "thinking": thoughts},
        *(part for part in parts if part != {"type": "text", "text": ""}),
    ]


def with_shown_thoughts(form: ToolFormat, message: Message) -> dict[str, Any]:
    """Adds the thoughts of a message in the form that the template reads."""
    thoughts, content = message.get(THOUGHTS), message.get("content") or ""
    if not thoughts:
        return dict(message)
    if form.takes_thought_parts:
        return {**message, "content": thought_parts(thoughts, content)}
    if message.get("tool_calls") and not form.takes_text_beside_thoughts and isinstance(content, str):
        thoughts, content = "\n\n".join(filter(None, (thoughts, content))), ""
        return {**message, **named_thoughts(thoughts), "content": content}
    return {**message, **named_thoughts(thoughts)}

"""Thoughts of earlier answers that clients send back, in the forms of all APIs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from llamaclust.cluster.front.schema import LenientContext
from llamaclust.model.chat.thoughts import NAMES, THOUGHTS

_BLOCK_NAMES: Final = ("reasoning_text", "thinking_blocks", "reasoning_details")
_ALL_NAMES: Final = (*NAMES, *_BLOCK_NAMES)
"""Names of a message's thoughts. If a message has several, the first that is not empty counts."""
_TEXTS: Final = ("text", "thinking", "reasoning", "summary", "content")
"""Names of a block's text."""
_KINDS: Final = ("thinking", "redacted_thinking", "reasoning", "thought", "thoughts")
_ENCRYPTED: Final = ("redacted_thinking", "reasoning.encrypted")
_MAX_DEPTH: Final = 4


def is_thought(block: Any) -> bool:
    """Returns True for a block of a message's content that has thoughts, not text."""
    return isinstance(block, dict) and block.get("type") in _KINDS


def sent_thoughts(value: Any, depth: int = 0) -> str:
    """Returns the text of thoughts: a text, a block or a list of blocks. Encrypted blocks have no text. Raises
    ValueError for other values."""
    if isinstance(value, str):
        return value
    if isinstance(value, dict) and depth < _MAX_DEPTH:
        if value.get("type") in _ENCRYPTED:
            return ""
        found = next((value[name] for name in _TEXTS if value.get(name)), None)
        if found is not None or any(name in value for name in _TEXTS) or "type" in value:
            return sent_thoughts(found or "", depth + 1)
    if isinstance(value, list) and depth < _MAX_DEPTH:
        return "\n".join(filter(None, (sent_thoughts(block, depth + 1) for block in value)))
    raise ValueError("thoughts must be a text or a list of blocks with a 'text'")


def with_thoughts(message: Mapping[str, Any], context: object, name: str = THOUGHTS) -> dict[str, Any]:
    """Moves an assistant's thoughts, whatever their name, into the field `name`. Thoughts of other roles are ignored.
    Raises ValueError, which names the field that has another form."""
    if message.get("role") != "assistant":
        return _without_thoughts(message, context)
    rest = {key: value for key, value in message.items() if key not in _ALL_NAMES}
    texts = [_placed(key, message[key]) for key in _ALL_NAMES if message.get(key) is not None]
    content = message.get("content")
    if isinstance(content, list) and any(map(is_thought, content)):
        texts.append(_placed("content", [*filter(is_thought, content)]))
        rest["content"] = [part for part in content if not is_thought(part)]
    thoughts = next(filter(None, texts), "")
    return {**rest, name: thoughts} if thoughts else rest


def _without_thoughts(message: Mapping[str, Any], context: object) -> dict[str, Any]:
    if not isinstance(context, LenientContext):
        return dict(message)
    rest, content = {key: value for key, value in message.items() if key not in _ALL_NAMES}, message.get("content")
    for name in message.keys() - rest.keys():
        if message[name] is not None:
            context.ignore(name)
    if isinstance(content, list) and any(map(is_thought, content)):
        context.ignore("content.thinking")
        rest["content"] = [part for part in content if not is_thought(part)]
    return rest


def _placed(name: str, value: Any) -> str:
    try:
        return sent_thoughts(value)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error

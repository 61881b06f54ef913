"""Rewrites chats that a strict template refuses. Does not change chats that the template renders completely."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby, takewhile
from typing import Any, Final

Message = Mapping[str, Any]
Messages = list[dict[str, Any]]

_BREAK: Final = "\n\n"
_MERGED: Final = ("system", "user", "assistant")
_SHOWN: Final = 64
_OF_ANSWERS: Final = ("content", "tool_calls", "reasoning_content")


def accepted_forms(messages: Sequence[Message]) -> Iterator[Messages]:
    """Yields versions of the chat, each with one more change: later system messages move into user messages, answers
    without text and calls are left out, adjacent messages with the same role are merged, an empty user message is put
    first, and finally the first system messages move into the first user message."""
    before = [dict(message) for message in messages]
    for change in _CHANGES:
        changed = change(before)
        if changed != before:
            yield changed
        before = changed


def lacks_system(messages: Sequence[Message], rendered: str) -> bool:
    """Returns True if the rendered chat lacks a system message. Some templates skip system messages."""
    systems = (_text(message).strip() for message in messages if message["role"] == "system")
    return any(text[:_SHOWN] not in rendered or text[-_SHOWN:] not in rendered for text in systems)


def _with_late_systems_joined(messages: Messages) -> Messages:
    """Moves each later system message into the user message just before it, or else into the next user message."""
    begin = len([*takewhile(_is_system, messages)])
    joined, waiting = messages[:begin], list[str]()
    for message in messages[begin:]:
        role = message["role"]
        if role == "system" and joined and joined[-1]["role"] == "user" and not waiting:
            joined[-1] = _with(joined[-1], _text(joined[-1]), _text(message))
        elif role == "system":
            waiting.append(_text(message))
        elif role == "user" and waiting:
            joined.append(_with(message, *waiting, _text(message)))
            waiting = []
        else:
            if waiting and role != "tool":
                joined.append(_user(*waiting))
                waiting = []
            joined.append(message)
    return [*joined, _user(*waiting)] if waiting else joined


def _without_empty_answers(messages: Messages) -> Messages:
    return [message for message in messages if message["role"] != "assistant" or any(map(message.get, _OF_ANSWERS))]


def _with_equal_roles_merged(messages: Messages) -> Messages:
    merged: Messages = []
    for role, group in groupby(messages, lambda message: message["role"]):
        same = [*group]
        merged += same if role not in _MERGED or len(same) == 1 else [_merged(same)]
    return merged


def _merged(same: Messages) -> dict[str, Any]:
    message = _with({key: value for each in same for key, value in each.items()}, *map(_text, same))
    calls = [call for each in same for call in each.get("tool_calls") or ()]
    thoughts = [str(each["reasoning_content"]) for each in same if each.get("reasoning_content")]
    more = {"tool_calls": calls, "reasoning_content": "\n".join(thoughts)}
    return message | {name: value for name, value in more.items() if value}


def _with_a_user_first(messages: Messages) -> Messages:
    begin = len([*takewhile(_is_system, messages)])
    begins = any(message["role"] == "user" for message in messages[begin : begin + 1])
    return messages if begins else [*messages[:begin], _user(), *messages[begin:]]


def _without_systems(messages: Messages) -> Messages:
    begin = len([*takewhile(_is_system, messages)])
    if not begin:
        return messages
    first = messages[begin]
    return [_with(first, *map(_text, messages[:begin]), _text(first)), *messages[begin + 1 :]]


_CHANGES: Final[tuple[Callable[[Messages], Messages], ...]] = (
    _with_late_systems_joined,
    _without_empty_answers,
    _with_equal_roles_merged,
    _with_a_user_first,
    _without_systems,
)


def _is_system(message: Message) -> bool:
    return bool(message["role"] == "system")


def _user(*texts: str) -> dict[str, Any]:
    return _with({"role": "user"}, *texts)


def _with(message: Message, *texts: str) -> dict[str, Any]:
    return {**message, "content": _BREAK.join(filter(None, texts))}


def _text(message: Message) -> str:
    return str(message.get("content") or "")

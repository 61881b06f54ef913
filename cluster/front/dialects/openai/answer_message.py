"""An answer as the message of a chat, whole or streamed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from llamaclust.cluster.front.fields.function_tools import ClientTool, call_id_of, text_of_call
from llamaclust.model.chat.tools.events import (
    AnswerEvent,
    ArgumentText,
    CallBegun,
    CallEnded,
    ContentText,
    ParsedAnswer,
    ReasoningText,
)


class MessageDeltas:
    """A streamed message. The text of a custom tool's call is known, and comes, at its end."""

    def __init__(self, choice_id: str, tools: Mapping[str, ClientTool]) -> None:
        """`tools`: by the names that the model knows."""
        self.has_calls = False
        self._choice_id = choice_id
        self._tools = tools
        self._texts: dict[int, list[str]] = {}  # arguments so far of open calls of custom tools

    def take(self, events: Iterable[AnswerEvent]) -> dict[str, Any]:
        """Returns one delta of all events. Clients put pieces together by kind, and calls by index."""
        answer = ParsedAnswer()
        calls: dict[int, dict[str, Any]] = {}
        for event in events:
            match event:
                case ReasoningText(text):
                    answer.reasoning += text
                case ContentText(text):
                    answer.content += text
                case CallBegun(index, name, call_id):
                    calls[index] = {"index": index, **self._begun(index, name, call_id)}
                case ArgumentText(index, text) if index in self._texts:
                    self._texts[index].append(text)
                case ArgumentText(index, text):
                    call = calls.setdefault(index, {"index": index, "function": {"arguments": ""}})
                    call["function"]["arguments"] += text
                case CallEnded(index) if index in self._texts:
                    self._end_text(index, calls)
        self.has_calls |= bool(calls)
        delta: dict[str, Any] = {"reasoning_content": answer.reasoning, "content": answer.content}
        return {key: text for key, text in delta.items() if text} | ({"tool_calls": [*calls.values()]} if calls else {})

    def _begun(self, index: int, name: str, call_id: str) -> dict[str, Any]:
        call = _shown_call(call_id or call_id_of(self._choice_id, index), name, "", self._tools)
        if call["type"] == "custom":
            self._texts[index] = []
        return call

    def _end_text(self, index: int, calls: dict[int, dict[str, Any]]) -> None:
        call = calls.setdefault(index, {"index": index, "custom": {}})
        call["custom"]["input"] = text_of_call("".join(self._texts.pop(index)))


def _shown_call(call_id: str, name: str, arguments: str, tools: Mapping[str, ClientTool]) -> dict[str, Any]:
    if name in tools and tools[name].kind == "custom":
        return {"id": call_id, "type": "custom", "custom": {"name": name, "input": text_of_call(arguments)}}
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def message_of(events: Iterable[AnswerEvent], choice_id: str, tools: Mapping[str, ClientTool]) -> dict[str, Any]:
    """The fields of a whole message: content is null beside calls where there is none."""
    answer = ParsedAnswer()
    answer.add(events)
    message: dict[str, Any] = {"content": answer.content or (None if answer.calls else "")}
    if answer.reasoning:
        message["reasoning_content"] = answer.reasoning
    if answer.calls:
        message["tool_calls"] = [
            _shown_call(call.call_id or call_id_of(choice_id, index), call.name, call.arguments, tools)
            for index, call in enumerate(answer.calls)
        ]
    return message

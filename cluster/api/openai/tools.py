"""Tools and reasoning in OpenAI's bodies and replies."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo, WithJsonSchema

from llamaclust.cluster.api.fields.foreign_parts import leave_out
from llamaclust.cluster.api.fields.reasoning import ReasoningFields
from llamaclust.cluster.api.openai.function_tools import MAX_TOOLS, call_id_of, function_tool, present
from llamaclust.cluster.text.chat import ToolMode, ToolUse
from llamaclust.model.chat.tools.events import (
    AnswerEvent,
    ArgumentText,
    CallBegun,
    ContentText,
    ParsedAnswer,
    ReasoningText,
)


def _tool(value: Any, info: ValidationInfo) -> Any:
    """Checks one tool; it is None if another server would run it."""
    kind = value.get("type") if isinstance(value, dict) else None
    if isinstance(kind, str) and kind != "function":
        return leave_out("tools", kind, info.context)
    if not isinstance(value, dict) or kind != "function" or not isinstance(value.get("function"), dict):
        raise ValueError("a tool must be an object with type 'function' and an object 'function'")
    return function_tool(value["function"], "function.")


def _call(value: Any) -> Any:
    function = value.get("function") if isinstance(value, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError("a call must be an object with a 'function', which has a 'name'")
    arguments = function.get("arguments") or "{}"
    arguments = "{}" if arguments == "[]" else arguments
    if not isinstance(arguments, str | dict):
        raise ValueError("function.arguments: must be a string of JSON")
    call_id = value.get("id") or ""
    if not isinstance(call_id, str):
        raise ValueError("id: must be a string")
    text = arguments if isinstance(arguments, str) else json.dumps(arguments)
    return {"id": call_id, "type": "function", "function": {"name": function["name"], "arguments": text}}


def _choice(value: Any) -> Any:
    if isinstance(value, str) and value in ("none", "auto", "required"):
        return value
    function = value.get("function", value) if isinstance(value, dict) else None
    if isinstance(function, dict) and isinstance(function.get("name"), str):
        return {"type": "function", "function": {"name": function["name"]}}
    raise ValueError('must be \'none\', \'auto\', \'required\' or {"type": "function", "function": {"name": ...}}')


_MODES: Final = {"none": ToolMode.NONE, "required": ToolMode.REQUIRED}
_OBJECT: Final = WithJsonSchema({"type": "object", "required": ["type", "function"]})
_ToolField = Annotated[Any, BeforeValidator(_tool), _OBJECT]
ToolsField = Annotated[list[_ToolField], Field(max_length=MAX_TOOLS), AfterValidator(present)]
CallField = Annotated[dict[str, Any], BeforeValidator(_call), _OBJECT]
_ChoiceField = Annotated[
    Any,
    BeforeValidator(_choice),
    WithJsonSchema({"anyOf": [{"enum": ["none", "auto", "required"]}, {"type": "object", "required": ["function"]}]}),
]


class ToolFields(ReasoningFields):
    """Which tools a chat offers, and how the answer shows reasoning."""

    tools: ToolsField = Field(default_factory=list)
    """Functions that the model may call; tools of other types are left out."""
    tool_choice: _ChoiceField = None
    """`auto` (the default), `none`, `required`, or the one function to be called."""
    parallel_tool_calls: bool | None = None
    """Whether an answer may have several calls; by default true, but one call where `tool_choice` asks for one."""
    reasoning_format: Literal["auto", "deepseek", "deepseek-legacy", "none"] = "auto"
    """`none`: reasoning stays in the content, as the model writes it; otherwise it is in `reasoning_content`."""

    def check_tools(self) -> None:
        """ParameterError for fields that contradict each other."""
        self.tool_use.check(self.tools)

    @property
    def tool_use(self) -> ToolUse:
        choice = self.tool_choice
        named = choice["function"]["name"] if isinstance(choice, dict) else None
        mode = ToolMode.REQUIRED if named else _MODES.get(choice, ToolMode.AUTO)
        return ToolUse.of(mode, named, self.parallel_tool_calls)


def delta_of(events: Iterable[AnswerEvent], choice_id: str) -> dict[str, Any]:
    """What events add to a streamed message, in one delta: clients put pieces together by kind, and calls by index."""
    answer = ParsedAnswer()
    calls: dict[int, dict[str, Any]] = {}
    for event in events:
        match event:
            case ReasoningText(text):
                answer.reasoning += text
            case ContentText(text):
                answer.content += text
            case CallBegun(index, name, call_id):
                function = {"name": name, "arguments": ""}
                calls[index] = {
                    "index": index,
                    "id": call_id or call_id_of(choice_id, index),
                    "type": "function",
                    "function": function,
                }
            case ArgumentText(index, text):
                calls.setdefault(index, {"index": index, "function": {"arguments": ""}})["function"]["arguments"] += (
                    text
                )
    delta: dict[str, Any] = {"reasoning_content": answer.reasoning, "content": answer.content}
    return {key: text for key, text in delta.items() if text} | ({"tool_calls": [*calls.values()]} if calls else {})


def message_of(events: Iterable[AnswerEvent], choice_id: str) -> dict[str, Any]:
    """The fields of a whole message: content is null beside calls where there is none."""
    answer = ParsedAnswer()
    answer.add(events)
    message: dict[str, Any] = {"content": answer.content or (None if answer.calls else "")}
    if answer.reasoning:
        message["reasoning_content"] = answer.reasoning
    if answer.calls:
        message["tool_calls"] = [
            {
                "id": call.call_id or call_id_of(choice_id, index),
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for index, call in enumerate(answer.calls)
        ]
    return message

"""Tools and reasoning in OpenAI's bodies and replies."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from hashlib import sha256
from typing import Annotated, Any, Final, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema

from llamaclust.cluster.api.schema import Body
from llamaclust.cluster.text.chat import ToolMode, ToolUse
from llamaclust.core.errors import ParameterError
from llamaclust.model.chat.tools.events import (
    AnswerEvent,
    ArgumentText,
    CallBegun,
    ContentText,
    ParsedAnswer,
    ReasoningText,
)

MAX_TOOLS: Final = 1024
_NAME: Final = re.compile(r"[\w.\-/:]{1,128}")
_ID_CHARACTERS: Final = 24


def _tool(value: Any) -> Any:
    if not isinstance(value, dict) or value.get("type") != "function" or not isinstance(value.get("function"), dict):
        raise ValueError("a tool must be an object with type 'function' and an object 'function'")
    function = value["function"]
    if not isinstance(function.get("name"), str) or not _NAME.fullmatch(function["name"]):
        raise ValueError("function.name: must have 1 to 128 letters, digits and characters of _.-/:")
    if not isinstance(function.get("parameters") or {}, dict):
        raise ValueError("function.parameters: must be a JSON schema, an object")
    if not isinstance(function.get("description") or "", str):
        raise ValueError("function.description: must be a string")
    known = {key: function[key] for key in ("name", "description", "parameters") if function.get(key) is not None}
    return {"type": "function", "function": {"description": "", "parameters": _NO_PARAMETERS, **known}}


def _call(value: Any) -> Any:
    function = value.get("function") if isinstance(value, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError("a call must be an object with a 'function', which has a 'name'")
    arguments = function.get("arguments") or "{}"
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


_NO_PARAMETERS: Final = {"type": "object", "properties": {}}
_MODES: Final = {"none": ToolMode.NONE, "required": ToolMode.REQUIRED}
_OBJECT: Final = WithJsonSchema({"type": "object", "required": ["type", "function"]})
ToolField = Annotated[dict[str, Any], BeforeValidator(_tool), _OBJECT]
CallField = Annotated[dict[str, Any], BeforeValidator(_call), _OBJECT]
_ChoiceField = Annotated[
    Any,
    BeforeValidator(_choice),
    WithJsonSchema({"anyOf": [{"enum": ["none", "auto", "required"]}, {"type": "object", "required": ["function"]}]}),
]


class ToolFields(Body):
    """Which tools a chat offers, and how the answer shows reasoning."""

    tools: list[ToolField] = Field(default_factory=list, max_length=MAX_TOOLS)
    """Functions that the model may call."""
    tool_choice: _ChoiceField = None
    """`auto` (the default), `none`, `required`, or the one function to be called."""
    parallel_tool_calls: bool | None = None
    """Whether an answer may have several calls; by default true, but one call where `tool_choice` asks for one."""
    reasoning_format: Literal["auto", "deepseek", "deepseek-legacy", "none"] = "auto"
    """`none`: reasoning stays in the content, as the model writes it; otherwise it is in `reasoning_content`."""

    reasoning_budget: int = -1
    """0: the answer begins without reasoning; -1: as the model decides. There is no other budget."""

    def check_tools(self) -> None:
        """ParameterError for fields that contradict each other."""
        if self.reasoning_budget not in (-1, 0):
            raise ParameterError("reasoning_budget", f"is {self.reasoning_budget}, must be -1 (no limit) or 0 (none)")
        names = [tool["function"]["name"] for tool in self.tools]
        use = self.tool_use
        if len(set(names)) < len(names):
            raise ParameterError("tools", "two functions have the same name")
        if use.mode is ToolMode.REQUIRED and not names:
            raise ParameterError("tool_choice", "needs tools")
        if use.name is not None and use.name not in names:
            raise ParameterError("tool_choice", f"names {use.name[:60]!r}, which is not among the tools")

    @property
    def tool_use(self) -> ToolUse:
        choice = self.tool_choice
        named = choice["function"]["name"] if isinstance(choice, dict) else None
        mode = ToolMode.REQUIRED if named else _MODES.get(choice, ToolMode.AUTO)
        is_parallel = self.parallel_tool_calls
        return ToolUse(mode, named, mode is not ToolMode.REQUIRED if is_parallel is None else is_parallel)


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


def call_id_of(choice_id: str, index: int) -> str:
    """Of a call that the model gave none: the same where a reply is computed again."""
    return f"call_{sha256(f'{choice_id} {index}'.encode()).hexdigest()[:_ID_CHARACTERS]}"

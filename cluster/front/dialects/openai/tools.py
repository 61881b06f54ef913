"""Tools and reasoning in bodies of OpenAI's chats."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo, WithJsonSchema

from llamaclust.cluster.front.dialects.openai.tool_choice import ALLOWED, MODES, ToolChoice, read_choice
from llamaclust.cluster.front.fields.foreign_parts import leave_out
from llamaclust.cluster.front.fields.function_tools import (
    MAX_TOOLS,
    ClientTool,
    arguments_of_text,
    function_tool,
    present,
    text_tool,
)
from llamaclust.cluster.front.fields.reasoning import ReasoningFields


def _function(value: Any, info: ValidationInfo) -> Any:
    """Checks one function; it is None for a tool of another type."""
    kind = value.get("type") if isinstance(value, dict) else None
    if isinstance(kind, str) and kind != "function":
        return leave_out("tools", kind, info.context)
    if not isinstance(value, dict) or kind != "function" or not isinstance(value.get("function"), dict):
        raise ValueError("a tool must be an object with type 'function' and an object 'function'")
    return function_tool(value["function"], "function.")


def _tool(value: Any, info: ValidationInfo) -> Any:
    """Checks one tool; it is None if another server would run it."""
    if not isinstance(value, dict) or value.get("type") != "custom":
        function = _function(value, info)
        return function and ClientTool("function", function["function"]["name"], function)
    if not isinstance(value.get("custom"), dict):
        raise ValueError("a tool of type 'custom' must have an object 'custom'")
    function = function_tool(text_tool(value["custom"], info.context), "custom.")
    return ClientTool("custom", function["function"]["name"], function)


def _call(value: Any) -> Any:
    """A call as the model made it, or would have."""
    if not isinstance(value, dict):
        raise ValueError("a call must be an object")
    call_id = value.get("id") or ""
    if not isinstance(call_id, str):
        raise ValueError("id: must be a string")
    function = _text_call(value) if value.get("type") == "custom" else _function_call(value)
    return {"id": call_id, "type": "function", "function": function}


def _text_call(value: Mapping[str, Any]) -> dict[str, str]:
    custom = value.get("custom")
    if not isinstance(custom, dict) or not all(isinstance(custom.get(name), str) for name in ("name", "input")):
        raise ValueError("a call of type 'custom' must have a 'custom' with the strings 'name' and 'input'")
    return {"name": custom["name"], "arguments": arguments_of_text(custom["input"])}


def _function_call(value: Mapping[str, Any]) -> dict[str, str]:
    function = value.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError("a call must be an object with a 'function', which has a 'name'")
    arguments = function.get("arguments") or "{}"
    arguments = "{}" if arguments == "[]" else arguments
    if not isinstance(arguments, str | dict):
        raise ValueError("function.arguments: must be a string of JSON")
    text = arguments if isinstance(arguments, str) else json.dumps(arguments)
    return {"name": function["name"], "arguments": text}


def _choice(value: Any) -> Any:
    if isinstance(value, dict) and value.get("type") == ALLOWED:
        allowed = value.get(ALLOWED)
        if not isinstance(allowed, dict):
            raise ValueError(f"{ALLOWED}: must be an object with 'mode' and 'tools'")
        tools = allowed.get("tools")
        tools = [*map(_flat, tools)] if isinstance(tools, list) else tools
        return read_choice({"type": ALLOWED, "mode": allowed.get("mode"), "tools": tools}, _EXAMPLE)
    return read_choice(_flat(value), _EXAMPLE)


def _flat(choice: Any) -> Any:
    """A tool that is named in the form of the Responses API. One without a type is a function."""
    if not isinstance(choice, dict):
        return choice
    kind = "custom" if choice.get("type") == "custom" else "function"
    named = choice.get(kind, choice)
    name = named.get("name") if isinstance(named, dict) else None
    return {"type": choice.get("type")} if name is None else {"type": kind, "name": name}


_EXAMPLE: Final = '{"type": "function", "function": {"name": ...}}'
_OBJECT: Final = WithJsonSchema({"type": "object", "required": ["type"]})
_FunctionField = Annotated[Any, BeforeValidator(_function), _OBJECT]
FunctionsField = Annotated[list[_FunctionField], Field(max_length=MAX_TOOLS), AfterValidator(present)]
_ToolField = Annotated[Any, BeforeValidator(_tool), _OBJECT]
_ToolsField = Annotated[list[_ToolField], Field(max_length=MAX_TOOLS), AfterValidator(present)]
CallField = Annotated[dict[str, Any], BeforeValidator(_call), _OBJECT]
_CHOICE: Final = {"anyOf": [{"enum": [*MODES]}, {"type": "object"}]}
_ChoiceField = Annotated[Any, BeforeValidator(_choice), WithJsonSchema(_CHOICE)]


class ToolFields(ReasoningFields):
    """Which tools a chat offers, and how the answer shows reasoning."""

    tools: _ToolsField = Field(default_factory=list)
    """Tools that the model may call, of type `function` or `custom`; those of other types are left out."""
    tool_choice: _ChoiceField = "auto"
    """`auto`, `none`, `required`, the one tool to be called, or `{"type": "allowed_tools", "allowed_tools": {"mode":
    "auto" or "required", "tools": [{"type": "function", "function": {"name": ...}}]}}`: only these of the tools are
    offered."""
    parallel_tool_calls: bool | None = None
    """Whether an answer may have several calls; by default true, but one call where `tool_choice` asks for one."""
    reasoning_format: Literal["auto", "deepseek", "deepseek-legacy", "none"] = "auto"
    """`none`: reasoning stays in the content, as the model writes it; otherwise it is in `reasoning_content`."""

    @property
    def choice(self) -> ToolChoice:
        return ToolChoice(self.tool_choice, self.tools, self.parallel_tool_calls)

"""Parts of OpenAI's request bodies: message content, tool definitions, tool calls, and `tool_choice`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BeforeValidator, Field, PlainValidator, ValidationInfo, WithJsonSchema

from llamaclust.cluster.front.images.parts import media_part, placed
from llamaclust.cluster.front.schema import LenientContext
from llamaclust.cluster.front.text.images import Content, Part, joined
from llamaclust.cluster.front.text.request import ToolMode, ToolUse
from llamaclust.cluster.front.thought_switches import BudgetFields, SwitchFields
from llamaclust.cluster.front.tools import (
    MAX_TOOLS,
    ClientTool,
    arguments_of_text,
    flat_name,
    function_tool,
    is_media,
    leave_out,
    present,
    text_tool,
)
from llamaclust.core.errors import ParameterError

_TEXT_KEYS: Final = frozenset(("type", "text", "id", "cache_control", "annotations", "citations", "logprobs"))
"""Keys of a text. Other keys may be known to the chat template, such as the languages of a translation."""
_PARTS: Final = {"type": "array", "items": {"type": "object", "required": ["type"]}}


def _content(value: Any, info: ValidationInfo) -> Content:
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError("must be a string or a list of parts")
    return joined([_part(place, part, info.context) for place, part in enumerate(value)])


def _part(place: int, part: Any, context: object) -> Part:
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        raise ValueError("a part must be an object with a 'type'")
    kind = part["type"]
    if is_media(kind):
        return placed(f"[{place}]", media_part, part, context)
    field = "refusal" if kind == "refusal" else "text"
    if kind not in ("text", "refusal"):
        raise ValueError(f"parts of type {kind[:60]!r} are not supported, only 'text'")
    if not isinstance(part.get(field), str):
        raise ValueError(f"a {kind} part needs the field {field!r}")
    return dict(part) if kind == "text" and part.keys() - _TEXT_KEYS else str(part[field])


ContentField = Annotated[Content, PlainValidator(_content), WithJsonSchema({"anyOf": [{"type": "string"}, _PARTS]})]


def _function(value: Any, info: ValidationInfo) -> Any:
    """Validates a function tool. Returns None for other tools, which are ignored. Raises ValueError."""
    kind = value.get("type") if isinstance(value, dict) else None
    if isinstance(kind, str) and kind != "function":
        return leave_out("tools", kind, info.context)
    if not isinstance(value, dict) or kind != "function" or not isinstance(value.get("function"), dict):
        raise ValueError("a tool must be an object with type 'function' and an object 'function'")
    return function_tool(value["function"], "function.")


def _tool(value: Any, info: ValidationInfo) -> Any:
    """Validates a function or custom tool. Returns None for other tools, which are ignored. Raises ValueError."""
    if not isinstance(value, dict) or value.get("type") != "custom":
        function = _function(value, info)
        return function and ClientTool("function", function["function"]["name"], function)
    if not isinstance(value.get("custom"), dict):
        raise ValueError("a tool of type 'custom' must have an object 'custom'")
    function = function_tool(text_tool(value["custom"], info.context), "custom.")
    return ClientTool("custom", function["function"]["name"], function)


def _call(value: Any) -> Any:
    """Converts a tool call to a function call, the only kind that chat templates know. Raises ValueError."""
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
        raise ValueError("a call of type 'custom' needs an object 'custom' with the strings 'name' and 'input'")
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
    """Converts a tool choice of chat completions to the form of the Responses API."""
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
MODES: Final = {"auto": ToolMode.AUTO, "none": ToolMode.NONE, "required": ToolMode.REQUIRED}
_CHOICE: Final = {"anyOf": [{"enum": [*MODES]}, {"type": "object"}]}
_ChoiceField = Annotated[Any, BeforeValidator(_choice), WithJsonSchema(_CHOICE)]


class ToolFields(BudgetFields, SwitchFields):
    tools: _ToolsField = Field(default_factory=list)
    """Tools of type `function` or `custom` that the model can call. Tools of other types are ignored."""
    tool_choice: _ChoiceField = "auto"
    """`auto`, `none`, `required`, an object that names one tool to call, or `{"type": "allowed_tools", "allowed_tools":
    {"mode": "auto" or "required", "tools": [...]}}` to offer only some of the tools."""
    parallel_tool_calls: bool | None = None
    """True to allow several tool calls in an answer. The default is true, unless `tool_choice` requires a call."""
    reasoning_format: Literal["auto", "deepseek", "deepseek-legacy", "none"] = "auto"
    """`none` leaves reasoning in the content. Other values move the reasoning to `reasoning_content`."""

    @property
    def choice(self) -> ToolChoice:
        return ToolChoice(self.tool_choice, self.tools, self.parallel_tool_calls)


ALLOWED: Final = "allowed_tools"


def read_choice(value: Any, example: str = '{"type": "function", "name": ...}') -> Any:
    """Validates a tool choice in the Responses API's form. Raises ValueError, with `example` in the message."""
    if isinstance(value, str) and value in MODES:
        return value
    if isinstance(value, dict) and value.get("type") == ALLOWED:
        mode, tools = value.get("mode"), value.get("tools")
        if mode not in ("auto", "required"):
            raise ValueError("mode: must be 'auto' or 'required'")
        if not isinstance(tools, list) or not 1 <= len(tools) <= MAX_TOOLS:
            raise ValueError(f"tools: must be a list of 1 to {MAX_TOOLS} tools")
        each = f"tools: each must be {example}"
        return {"type": ALLOWED, "mode": mode, "tools": [_named_tool(tool, each) for tool in tools]}
    return _named_tool(value, f"must be 'none', 'auto', 'required', {example} or {ALLOWED}")


def _named_tool(value: Any, message: str) -> dict[str, str]:
    kind = value.get("type") if isinstance(value, dict) else None
    names = {key: value[key] for key in ("type", "name", "namespace") if value.get(key) is not None} if kind else {}
    needs_name = kind in ("function", "custom")
    if not names or not all(isinstance(name, str) for name in names.values()) or (needs_name and "name" not in names):
        raise ValueError(message)
    return names


@dataclass(frozen=True, slots=True)
class ToolChoice:
    choice: Any  # Result of `read_choice`.
    tools: Sequence[ClientTool]
    is_parallel: bool | None  # True to allow several calls. None: True, unless a call is required.

    @property
    def use(self) -> ToolUse:
        if not isinstance(self.choice, dict):
            return ToolUse.of(MODES[self.choice], None, self.is_parallel)
        if self.choice["type"] == ALLOWED:
            return ToolUse.of(MODES[self.choice["mode"]], None, self.is_parallel)
        named = next(tool for tool in self.tools if tool.is_named_by(self.choice))
        return ToolUse.of(ToolMode.REQUIRED, named.function_name, self.is_parallel)

    @property
    def offered(self) -> tuple[dict[str, Any], ...]:
        tools = self.tools
        if isinstance(self.choice, dict) and self.choice["type"] == ALLOWED:
            tools = [tool for tool in tools if any(map(tool.is_named_by, self.choice["tools"]))]
        return tuple(tool.function for tool in tools)

    def check(self) -> None:
        """Raises ParameterError if two tools have the same name, or if a required tool is not offered."""
        if isinstance(self.choice, dict):
            self._check_names()
        self.use.check(self.offered)

    def _check_names(self) -> None:
        is_allowed = self.choice["type"] == ALLOWED
        for tool in self.choice["tools"] if is_allowed else [self.choice]:
            may_be_missing = is_allowed and tool["type"] not in ("function", "custom")
            if not may_be_missing and not any(each.is_named_by(tool) for each in self.tools):
                what = repr(tool.get("name", tool["type"])[:60])
                does = "allows" if is_allowed else "names"
                raise ParameterError("tool_choice", f"{does} {what}, which is not among the tools that can run here")


_STRING: Final = {"type": "string"}
_NUMBER: Final = {"type": "integer"}
_STRINGS: Final = {"type": "array", "items": _STRING}
_HOSTED_ENVIRONMENTS: Final = ("container_auto", "container_reference")


@dataclass(frozen=True, slots=True)
class BuiltInTool:
    """A tool with fixed parameters, such as `shell`. `field` is the name of the field that holds a call's arguments."""

    field: str
    fixed: Mapping[str, Any]  # Default values in the object `field`.
    description: str
    properties: Mapping[str, Any]
    required: tuple[str, ...]
    marks: Mapping[str, Any]  # Other fields of a call's item.


BUILT_IN: Final = {
    "local_shell": BuiltInTool(
        "action",
        {"type": "exec", "command": [], "env": {}},
        "Runs a command on the user's machine.",
        {"command": _STRINGS, "working_directory": _STRING, "timeout_ms": _NUMBER},
        ("command",),
        {},
    ),
    "shell": BuiltInTool(
        "action",
        {"commands": []},
        "Runs commands in a shell on the user's machine.",
        {"commands": _STRINGS, "timeout_ms": _NUMBER, "max_output_length": _NUMBER},
        ("commands",),
        {},
    ),
    "apply_patch": BuiltInTool(
        "operation",
        {"type": "update_file", "path": "", "diff": ""},
        "Creates, changes or deletes a file; `diff` is in the V4A format.",
        {"type": {"enum": ["create_file", "update_file", "delete_file"]}, "path": _STRING, "diff": _STRING},
        ("type", "path"),
        {},
    ),
    "tool_search": BuiltInTool(
        "arguments",
        {},
        "Finds more tools, which can then be called.",
        {"query": _STRING},
        ("query",),
        {"execution": "client"},
    ),
}


@dataclass(frozen=True, slots=True)
class ToolSet:
    """The client-side tools of a Responses API request."""

    client: tuple[ClientTool, ...] = ()
    shown: tuple[dict[str, Any], ...] = ()  # Definitions of the tools that the response repeats.

    def with_found(self, holders: Iterable[Mapping[str, Any]]) -> ToolSet:
        """Adds the client-side tools in the key `tools` of items or messages. Tools of the same name are one tool."""
        names = {tool.function_name for tool in self.client}
        found: dict[str, ClientTool] = {}
        for tool in chain.from_iterable(holder.get("tools") or () for holder in holders):
            own = {each.function_name: each for each in _client_tools(tool, None, LenientContext())}
            found |= {name: each for name, each in own.items() if name not in names}
        if len(self.client) + len(found) > MAX_TOOLS:
            raise ParameterError("input", f"more than {MAX_TOOLS} tools, including those in the input")
        return ToolSet((*self.client, *found.values()), self.shown)


def read_tools(value: Any, context: object) -> ToolSet:
    """Validates tools. Raises ValueError for invalid tools, or for hosted tools if `context` is no `LenientContext`."""
    if not isinstance(value, list) or len(value) > MAX_TOOLS:
        raise ValueError(f"must be a list of at most {MAX_TOOLS} tools")
    client, shown = list[ClientTool](), list[dict[str, Any]]()
    for place, tool in enumerate(value):
        try:
            own = [*_client_tools(tool, None, context)]
        except ValueError as error:
            raise ValueError(f"[{place}]: {error}") from error
        client += own
        shown += [_shown_tool(tool, own)] if own else []
        if len(client) > MAX_TOOLS:
            raise ValueError(f"[{place}]: more than {MAX_TOOLS} tools, including the tools in namespaces")
    return ToolSet(tuple(client), tuple(shown))


def _client_tools(tool: Any, namespace: str | None, context: object) -> Iterator[ClientTool]:
    kind = tool.get("type") if isinstance(tool, dict) else None
    if not isinstance(kind, str):
        raise ValueError("a tool must be an object with a 'type'")
    if kind == "namespace":
        name, tools = tool.get("name"), tool.get("tools")
        if not isinstance(name, str) or not isinstance(tools, list):
            raise ValueError("a namespace must have a 'name' and a list of 'tools'")
        if len(tools) > MAX_TOOLS:
            raise ValueError(f"{len(tools)} tools in a namespace; the limit is {MAX_TOOLS}")
        for each in tools:
            yield from _client_tools(each, name, context)
    elif kind == "function":
        nested = tool.get("function")
        yield _named(kind, nested if isinstance(nested, dict) else tool, namespace)
    elif kind == "custom":
        yield _named(kind, text_tool(tool, context), namespace)
    elif kind in BUILT_IN and not _is_hosted(tool):
        built_in = BUILT_IN[kind]
        schema = {"type": "object", "properties": built_in.properties, "required": [*built_in.required]}
        fields = {"description": tool.get("description") or built_in.description, "parameters": schema}
        yield ClientTool(kind, kind, function_tool({**fields, **_own_parameters(tool), "name": kind}))
    else:
        leave_out("tools", kind, context)


def _own_parameters(tool: Mapping[str, Any]) -> dict[str, Any]:
    return {"parameters": tool["parameters"]} if tool.get("parameters") else {}


def _is_hosted(tool: Mapping[str, Any]) -> bool:
    if tool["type"] == "tool_search":
        return tool.get("execution") != "client"
    environment = tool.get("environment")
    return isinstance(environment, dict) and environment.get("type") in _HOSTED_ENVIRONMENTS


def _named(kind: str, fields: Mapping[str, Any], namespace: str | None) -> ClientTool:
    function_tool(fields)  # Checks the name without the namespace too.
    flat = function_tool({**fields, "name": flat_name(namespace, fields["name"])})
    return ClientTool(kind, fields["name"], flat, namespace)


def _shown_tool(tool: dict[str, Any], own: list[ClientTool]) -> dict[str, Any]:
    """Returns a tool's definition for the response."""
    if tool["type"] != "function":
        return tool
    function = own[0].function["function"]
    fields = {name: function[name] for name in ("name", "description", "parameters")}
    return {"type": "function", **fields, "strict": False}

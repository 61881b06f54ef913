"""Tools, thinking and the form of the output in Anthropic's bodies."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo, WithJsonSchema

from llamaclust.cluster.front.fields.foreign_parts import leave_out
from llamaclust.cluster.front.fields.function_tools import MAX_TOOLS, function_tool, present
from llamaclust.cluster.front.foreign_fields import ANTHROPIC_TOOL, THINKING
from llamaclust.cluster.front.schema import Body, read_part
from llamaclust.cluster.front.text.chat import ToolMode, ToolUse
from llamaclust.core.errors import ParameterError
from llamaclust.core.sampling import Grammar
from llamaclust.model.grammars import definitions

_MODES: Final = {"auto": ToolMode.AUTO, "none": ToolMode.NONE, "any": ToolMode.REQUIRED, "tool": ToolMode.REQUIRED}


_TEXT: Final = {"type": "string"}
_TEXTS: Final = ("path", "file_text", "old_str", "new_str", "insert_text", "old_path", "new_path")
_FILES: Final[dict[str, Any]] = {
    **dict.fromkeys(_TEXTS, _TEXT),
    "insert_line": {"type": "integer"},
    "view_range": {"type": "array", "items": {"type": "integer"}},
}


def _file_tool(description: str, *commands: str) -> dict[str, Any]:
    properties = {"command": {"enum": [*commands]}, **_FILES}
    parameters = {"type": "object", "properties": properties, "required": ["command"]}
    return {"description": description, "parameters": parameters}


_EDITS: Final = ("view", "create", "str_replace", "insert")
_CLIENT_TOOLS: Final[dict[str, dict[str, Any]]] = {
    "bash_": {
        "description": "Runs a command in a bash session on the user's machine; restart begins a new one.",
        "parameters": {
            "type": "object",
            "properties": {"command": _TEXT, "restart": {"type": "boolean"}},
        },
    },
    "text_editor_": _file_tool("Shows, creates and changes files.", *_EDITS),
    "memory_": _file_tool("Keeps notes in files below /memories.", *_EDITS, "delete", "rename"),
}
"""Tools that the client runs and knows by their type alone: what a type begins with, before its date."""


class Tool(Body):
    """A function that the model may call; the client runs it."""

    name: str
    description: str | None = None
    input_schema: dict[str, Any]
    type: Literal["custom"] = "custom"


class ToolChoice(Body):
    """Whether the answer calls tools."""

    type: Literal["auto", "any", "tool", "none"]
    """`any`: at least one; `tool`: the one of that `name`."""
    name: str | None = None
    disable_parallel_tool_use: bool | None = None
    """At most one call; by default where `type` asks for a call."""

    @property
    def use(self) -> ToolUse:
        if (self.type == "tool") != (self.name is not None):
            raise ParameterError("tool_choice.name", "belongs to type 'tool', which needs it")
        is_parallel = None if self.disable_parallel_tool_use is None else not self.disable_parallel_tool_use
        return ToolUse.of(_MODES[self.type], self.name, is_parallel)


class Thinking(Body):
    """Whether the model may think before it answers."""

    type: Literal["enabled", "adaptive", "disabled"]
    budget_tokens: Annotated[int, Field(ge=0)] | None = None
    """Tokens of thinking at most, after which its end follows; by default no limit."""


class OutputConfig(Body):
    """How the answer looks."""

    format: Any = None
    """`{"type": "json_schema", "schema": ...}`."""
    effort: str | None = None
    """Passed to the chat template as `reasoning_effort`."""

    def grammar(self) -> Grammar | None:
        return output_grammar(self.format, "output_config.format")


def output_grammar(value: Any, origin: str) -> Grammar | None:
    """Of `{"type": "json_schema", "schema": ...}`; ParameterError for another form."""
    if value is None:
        return None
    if not isinstance(value, dict) or value.get("type") != "json_schema" or not isinstance(value.get("schema"), dict):
        raise ParameterError(origin, 'must be {"type": "json_schema", "schema": {...}}')
    return definitions.of_schema(value["schema"], origin)


def _tool(value: Any, info: ValidationInfo) -> Any:
    """Checks one tool; it is None if Anthropic's servers would run it."""
    if not isinstance(value, dict):
        raise ValueError("a tool must be an object with 'name' and 'input_schema'")
    kind = value.get("type")
    if kind in (None, "custom"):
        read_part(Tool, value, ANTHROPIC_TOOL, info.context)
        return function_tool(value, parameters="input_schema")
    known = next((known for begin, known in _CLIENT_TOOLS.items() if str(kind).startswith(begin)), None)
    if known is None:
        return leave_out("tools", str(kind), info.context)
    return function_tool({"name": value.get("name"), **known})


def _thinking(value: Any, info: ValidationInfo) -> Any:
    if not isinstance(value, dict):
        raise ValueError("must be an object with a 'type'")
    return read_part(Thinking, value, THINKING, info.context)


_TOOL_SCHEMA: Final = WithJsonSchema({"type": "object", "required": ["name"]})
_THINKING_SCHEMA: Final = WithJsonSchema({"type": "object", "required": ["type"]})
_ToolField = Annotated[Any, BeforeValidator(_tool), _TOOL_SCHEMA]
ToolsField = Annotated[list[_ToolField], Field(max_length=MAX_TOOLS), AfterValidator(present)]
ThinkingField = Annotated[Thinking, BeforeValidator(_thinking), _THINKING_SCHEMA]

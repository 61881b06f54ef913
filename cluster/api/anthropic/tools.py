"""Tools, thinking and the form of the output in Anthropic's bodies."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, WithJsonSchema

from llamaclust.cluster.api.foreign_fields import ANTHROPIC_TOOL, THINKING
from llamaclust.cluster.api.openai.function_tools import function_tool
from llamaclust.cluster.api.schema import Body, read_part
from llamaclust.cluster.text.chat import ToolMode, ToolUse
from llamaclust.core.errors import ParameterError
from llamaclust.core.sampling import Grammar
from llamaclust.model.grammars import definitions

_MODES: Final = {"auto": ToolMode.AUTO, "none": ToolMode.NONE, "any": ToolMode.REQUIRED, "tool": ToolMode.REQUIRED}


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
    if not isinstance(value, dict):
        raise ValueError("a tool must be an object with 'name' and 'input_schema'")
    kind = value.get("type", "custom")
    if kind not in (None, "custom"):
        raise ValueError(f"tools of type {str(kind)[:60]!r} are run by Anthropic's servers and not supported here")
    read_part(Tool, value, ANTHROPIC_TOOL, info.context)
    return function_tool(value, parameters="input_schema")


def _thinking(value: Any, info: ValidationInfo) -> Any:
    if not isinstance(value, dict):
        raise ValueError("must be an object with a 'type'")
    return read_part(Thinking, value, THINKING, info.context)


_TOOL_SCHEMA: Final = WithJsonSchema({"type": "object", "required": ["name", "input_schema"]})
_THINKING_SCHEMA: Final = WithJsonSchema({"type": "object", "required": ["type"]})
ToolField = Annotated[dict[str, Any], BeforeValidator(_tool), _TOOL_SCHEMA]
ThinkingField = Annotated[Thinking, BeforeValidator(_thinking), _THINKING_SCHEMA]

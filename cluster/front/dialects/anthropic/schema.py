"""The request body of Anthropic's `/v1/messages`: messages, tools, thinking, and the output format."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, groupby
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BeforeValidator, FailFast, Field, ValidationInfo, WithJsonSchema

from llamaclust.cluster.front.foreign_fields import ANTHROPIC_TOOL, MESSAGES
from llamaclust.cluster.front.images.parts import media_part, placed
from llamaclust.cluster.front.schema import Body, LimitField, StopField, read_part
from llamaclust.cluster.front.sent_thoughts import sent_thoughts
from llamaclust.cluster.front.shared_fields import AnswerFields
from llamaclust.cluster.front.text.images import Part, joined, text_part
from llamaclust.cluster.front.text.request import (
    ChatRequest,
    ToolMode,
    ToolUse,
    prompt_end,
)
from llamaclust.cluster.front.thought_switches import BudgetFields, SwitchFields
from llamaclust.cluster.front.tools import (
    MAX_TOOLS,
    function_tool,
    is_media,
    leave_out,
    media_text,
    present,
    tool_text,
)
from llamaclust.core.errors import ParameterError
from llamaclust.core.sampler.matchers import Grammar
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
"""Definitions of Anthropic's tools that the client runs, by type without the date, such as `bash_`."""


class Tool(Body, foreign=ANTHROPIC_TOOL):
    name: str
    description: str | None = None
    input_schema: dict[str, Any]
    type: Literal["custom"] = "custom"


class ToolChoice(Body):
    type: Literal["auto", "any", "tool", "none"]
    """`auto`: the model decides. `none`: no calls. `any`: at least one call. `tool`: the tool `name` must be called."""
    name: str | None = None
    disable_parallel_tool_use: bool | None = None
    """True to allow at most one tool call in an answer. The default is true if `type` requires a call."""

    @property
    def use(self) -> ToolUse:
        if (self.type == "tool") != (self.name is not None):
            raise ParameterError("tool_choice.name", "must be given for type 'tool' and for no other type")
        is_parallel = None if self.disable_parallel_tool_use is None else not self.disable_parallel_tool_use
        return ToolUse.of(_MODES[self.type], self.name, is_parallel)


class OutputConfig(Body):
    format: Any = None
    """The format of the answer: `{"type": "json_schema", "schema": {...}}`. The default is plain text."""
    effort: str | None = None
    """The amount of reasoning, such as `low`. The chat template receives it as `reasoning_effort`."""

    def grammar(self) -> Grammar | None:
        return output_grammar(self.format, "output_config.format")


def output_grammar(value: Any, origin: str) -> Grammar | None:
    if value is None:
        return None
    if not isinstance(value, dict) or value.get("type") != "json_schema" or not isinstance(value.get("schema"), dict):
        raise ParameterError(origin, 'must be {"type": "json_schema", "schema": {...}}')
    return definitions.of_schema(value["schema"], origin)


def _tool(value: Any, info: ValidationInfo) -> Any:
    """Converts a tool to OpenAI's JSON. Returns None for a tool that runs on Anthropic's servers. Raises ValueError."""
    if not isinstance(value, dict):
        raise ValueError("a tool must be an object with 'name' and 'input_schema'")
    kind = value.get("type")
    if kind in (None, "custom"):
        read_part(Tool, value, info.context)
        return function_tool(value, parameters="input_schema")
    known = next((known for begin, known in _CLIENT_TOOLS.items() if str(kind).startswith(begin)), None)
    if known is None:
        return leave_out("tools", str(kind), info.context)
    return function_tool({"name": value.get("name"), **known})


_TOOL_SCHEMA: Final = WithJsonSchema({"type": "object", "required": ["name"]})
_ToolField = Annotated[Any, BeforeValidator(_tool), _TOOL_SCHEMA]
ToolsField = Annotated[list[_ToolField], Field(max_length=MAX_TOOLS), AfterValidator(present)]


_BILLING: Final = re.compile(r"x-anthropic-billing-header:(?:[ \t]*\w+=[^;\s]*(?:;|(?=\n)|\Z))*[ \t]*\n?")
"""Matches the billing header of Claude Code's system prompt. It changes with each request, so it is removed."""
_ROLES: Final = ("user", "assistant", "system")
_ERROR: Final = "Error: "


@dataclass(frozen=True, slots=True)
class Turn:
    """The merged content of successive messages with the same role."""

    role: str
    parts: tuple[Part, ...] = ()
    thoughts: tuple[str, ...] = ()  # Thinking texts of an assistant's turn.
    calls: tuple[dict[str, Any], ...] = ()  # Tool calls of an assistant's turn, in OpenAI's form.
    results: tuple[dict[str, Any], ...] = ()  # Tool results of a user's turn, as messages of role tool.

    @classmethod
    def of(cls, role: str, turns: Iterable[Turn]) -> Turn:
        turns = [*turns]
        return cls(
            role,
            tuple(part for turn in turns for part in turn.parts),
            tuple(thought for turn in turns for thought in turn.thoughts),
            tuple(call for turn in turns for call in turn.calls),
            tuple(result for turn in turns for result in turn.results),
        )

    def messages(self) -> Iterator[dict[str, Any]]:
        """Yields the turn's chat messages. Tool results come first, because they answer the previous turn's calls."""
        yield from self.results
        content = joined(self.parts)
        if self.role == "assistant":
            more = {"reasoning_content": "\n".join(filter(None, self.thoughts)), "tool_calls": [*self.calls]}
            yield {"role": self.role, "content": content, **{name: value for name, value in more.items() if value}}
        elif self.parts or not self.results:
            yield {"role": self.role, "content": content}


def read_turn(message: Any, info: ValidationInfo) -> Turn:
    """Converts a message to a turn. Raises ValueError if the message is invalid."""
    if not isinstance(message, dict) or message.get("role") not in _ROLES:
        raise ValueError(f"a message must be an object with a 'role' of {', '.join(_ROLES)}")
    role, content = message["role"], message.get("content")
    if isinstance(content, str):
        return Turn(role, (content,))
    if not isinstance(content, list):
        raise ValueError("content: must be a string or a list of blocks")
    turns = []
    for place, block in enumerate(content):
        try:
            turns.append(_block(role, block, info.context))
        except ValueError as error:
            raise ValueError(f"content[{place}]: {error}") from error
    return Turn.of(role, turns)


def merged_turns(turns: Iterable[Turn]) -> list[Turn]:
    return [Turn.of(role, same) for role, same in groupby(turns, lambda turn: turn.role)]


def read_system(value: Any, info: ValidationInfo) -> str:
    if not isinstance(value, str | list):
        raise ValueError("must be a string or a list of text blocks")
    texts = (_without_billing(text) for text in _texts(value, info.context))
    return "\n".join(text for text in texts if text)


def _without_billing(text: str) -> str:
    header = _BILLING.match(text)
    return text if header is None else text[header.end() :]


def _block(role: str, block: Any, context: object) -> Turn:
    kind = block.get("type") if isinstance(block, dict) else None
    if not isinstance(kind, str):
        raise ValueError("a block must be an object with a 'type'")
    match role, kind:
        case _, "text":
            return Turn(role, parts=(_text(block, "text"),))
        case "assistant", "thinking" | "redacted_thinking":
            return Turn(role, thoughts=(sent_thoughts(block),))
        case "assistant", "tool_use":
            return Turn(role, calls=(_call(block),))
        case "user", "tool_result":
            return Turn(role, results=(_result(block, context),))
        case "assistant", _ if kind.endswith(("_tool_use", "_tool_result")):  # Another server ran the tool.
            leave_out("content", kind, context)
            return Turn(role, parts=(tool_text(kind, block),))
    return Turn(role, parts=tuple(_parts_of(block, context)))


def _parts_of(block: Any, context: object) -> list[Part]:
    """Returns the texts and images of a block of a message or of a tool result."""
    kind, source = (block.get("type"), block.get("source")) if isinstance(block, dict) else (None, None)
    inner = source.get("type") if isinstance(source, dict) else None
    if kind == "document" and isinstance(source, dict) and inner == "content":
        return _parts(source.get("content"), context)
    if isinstance(kind, str) and is_media(kind) and inner != "text":
        return [media_part(block, context)]
    text = _text_of(block, context)
    return [] if text is None else [text]


def _text_of(block: Any, context: object) -> str | None:
    """Returns a block as text, or None for a block of an unknown type, which is left out."""
    kind = block.get("type") if isinstance(block, dict) else None
    if kind == "text":
        return _text(block, "text")
    if kind == "compaction":  # The summary of earlier messages.
        return str(block.get("content") or "")
    if kind == "tool_reference":  # A tool search found this tool. The model gets all tools anyway.
        return _text(block, "tool_name")
    if kind == "search_result":
        return "\n".join(
            [*(str(block.get(name) or "") for name in ("title", "source")), *_texts(block.get("content"), context)]
        )
    source = block.get("source") if kind == "document" else None
    if isinstance(source, dict) and source.get("type") == "text":
        return _text(source, "data")
    if isinstance(source, dict) and source.get("type") == "content":
        return "\n".join(_texts(source.get("content"), context))
    if isinstance(kind, str) and is_media(kind):
        return media_text(kind, context)
    if not isinstance(kind, str):
        raise ValueError("a block must be an object with a 'type'")
    if isinstance(block.get("text"), str):
        return str(block["text"])
    leave_out("content", kind, context)
    return None


def _call(block: dict[str, Any]) -> dict[str, Any]:
    arguments = block.get("input") or {}
    if not isinstance(arguments, dict):
        raise ValueError("input: must be an object")
    function = {"name": _text(block, "name"), "arguments": json.dumps(arguments, ensure_ascii=False)}
    return {"id": _text(block, "id"), "type": "function", "function": function}


def _result(block: dict[str, Any], context: object) -> dict[str, Any]:
    shown = joined(_parts(block.get("content") or "", context))
    if block.get("is_error") is True:
        shown = _ERROR + shown if isinstance(shown, str) else [text_part(_ERROR.strip()), *shown]
    return {"role": "tool", "tool_call_id": _text(block, "tool_use_id"), "content": shown}


def _parts(content: Any, context: object) -> list[Part]:
    each = [placed(f"content[{at}]", _parts_of, block, context) for at, block in enumerate(_blocks(content))]
    return [*chain.from_iterable(each)]


def _texts(content: Any, context: object) -> list[str]:
    texts = (_text_of(block, context) for block in _blocks(content))
    return [text for text in texts if text is not None]


def _blocks(content: Any) -> list[Any]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise ValueError("content: must be a string or a list of blocks")
    return content


def _text(block: dict[str, Any], name: str) -> str:
    if not isinstance(block.get(name), str):
        raise ValueError(f"{name}: must be a string")
    return str(block[name])


_BLOCKS: Final[dict[str, Any]] = {"type": "array", "items": {"type": "object", "required": ["type"]}}
_CONTENT: Final = {"anyOf": [{"type": "string"}, _BLOCKS]}
_MESSAGE: Final = {
    "type": "object",
    "required": ["role", "content"],
    "properties": {"role": {"enum": ["user", "assistant", "system"]}, "content": _CONTENT},
}
_TurnField = Annotated[Any, BeforeValidator(read_turn), WithJsonSchema(_MESSAGE)]
_SystemField = Annotated[str, BeforeValidator(read_system), WithJsonSchema(_CONTENT)]


class MessagesBody(AnswerFields, BudgetFields, SwitchFields, foreign=MESSAGES):
    model: str | None = None
    """Name of the model. With one model and without `api.strict_model`, any name is accepted."""
    messages: Annotated[list[_TurnField], FailFast(), Field(min_length=1, max_length=16_384)]
    """The chat so far. A message has a text, or blocks of type text, image, thinking, tool_use and tool_result. Short
    texts replace media that the model cannot read. Successive messages of the same role are joined. If the last message
    has the role assistant, the answer continues that message."""
    system: _SystemField = ""
    """The system prompt, as a text or text blocks. Claude Code's billing header at its beginning is removed."""
    max_tokens: LimitField = None
    """The maximum number of tokens in the answer. The default is as many as fit into the context."""
    stop_sequences: StopField = ()
    """Texts that end the answer. The answer ends before the first occurrence of any of them."""
    tools: ToolsField = Field(default_factory=list)
    """Functions of the client, and Anthropic's tools bash_*, text_editor_* and memory_*. Other tools are removed."""
    tool_choice: ToolChoice | None = None
    """The choice of tools that the model can or must call."""
    output_config: OutputConfig | None = None
    output_format: Any = None
    """The older name for `output_config.format`."""

    @property
    def tool_use(self) -> ToolUse:
        return ToolUse() if self.tool_choice is None else self.tool_choice.use

    def request(self) -> ChatRequest:
        self.tool_use.check(self.tools)
        turns = merged_turns(self.messages)
        if turns[-1].calls:
            raise ParameterError("messages", "the chat ends with a tool_use block: add a tool_result for it")
        system = [{"role": "system", "content": self.system}] if self.system else []
        effort = self.output_config.effort if self.output_config is not None else None
        return ChatRequest(
            (*system, *(message for turn in turns for message in turn.messages())),
            self.completion((), self.max_tokens, stop=self.stop_sequences, grammar=self._grammar()),
            tuple(self.tools),
            end=prompt_end([turn.role for turn in turns], None, None),
            tool_use=self.tool_use,
            thoughts=self.thoughts(self, {"output_config.effort": effort}),
        )

    def _grammar(self) -> Grammar | None:
        grammar = None if self.output_config is None else self.output_config.grammar()
        return grammar or output_grammar(self.output_format, "output_format")

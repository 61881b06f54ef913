"""Functions that a model may call, as all APIs know them within."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Final

from llamaclust.cluster.front.fields.foreign_parts import leave_out
from llamaclust.model.chat.tools.argument_values import arguments_object

MAX_TOOLS: Final = 1024
TEXT_ARGUMENT: Final = "input"
"""The argument of a function in place of a custom tool."""
_BETWEEN: Final = "__"
_NAME: Final = re.compile(r"[\w.\-/:]{1,128}")
_ID_CHARACTERS: Final = 24
_OBJECTS: Final = frozenset({"properties", "patternProperties", "$defs", "definitions"})
_VALUES: Final = frozenset({"default", "const", "enum", "examples"})
"""Keys of a JSON schema whose values are objects, or any values."""
_NO_PARAMETERS: Final = {"type": "object", "properties": {}}


@dataclass(frozen=True, slots=True)
class ClientTool:
    """A tool that the client runs."""

    kind: str  # function, custom, or one that clients know by its type alone
    name: str  # as its client knows it
    function: dict[str, Any]  # OpenAI's definition, for the model
    namespace: str | None = None

    @property
    def function_name(self) -> str:
        """The function's name in the prompt and in calls of the model."""
        return str(self.function["function"]["name"])

    def is_named_by(self, choice: Mapping[str, Any]) -> bool:
        """Returns whether `tool_choice` names this tool."""
        named = choice["type"], choice.get("name", choice["type"]), choice.get("namespace")
        return named == (self.kind, self.name, self.namespace)


def function_tool(function: Mapping[str, Any], place: str = "", parameters: str = "parameters") -> dict[str, Any]:
    """OpenAI's definition of a function. `place` and `parameters` name its fields in messages: ValueError for a field
    of another form."""
    if not isinstance(function.get("name"), str) or not _NAME.fullmatch(function["name"]):
        raise ValueError(f"{place}name: must have 1 to 128 letters, digits and characters of _.-/:")
    if not isinstance(function.get(parameters) or {}, dict):
        raise ValueError(f"{place}{parameters}: must be a JSON schema, an object")
    if not isinstance(function.get("description") or "", str):
        raise ValueError(f"{place}description: must be a string")
    made = {"name": function["name"], "description": function.get("description") or ""}
    return {
        "type": "function",
        "function": {**made, "parameters": with_objects(function.get(parameters)) or _NO_PARAMETERS},
    }


def with_objects(schema: Any) -> Any:
    """A JSON schema with {} for each [] in the place of an object."""
    if isinstance(schema, list):
        return [with_objects(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: value if key in _VALUES else with_objects(value) for key, value in schema.items()}
    for key in _OBJECTS & made.keys():
        if isinstance(of_names := made[key] or {}, dict):
            made[key] = {name: {} if part == [] else part for name, part in of_names.items()}
    return made


def present(tools: list[Any]) -> list[Any]:
    """The tools that were not left out, as None stands for one that was."""
    return [tool for tool in tools if tool is not None]


def flat_name(namespace: str | None, name: str) -> str:
    """The name of a function that may be in a namespace, as the model knows it."""
    return name if namespace is None else f"{namespace}{_BETWEEN}{name}"


def text_tool(tool: Mapping[str, Any], context: object) -> dict[str, Any]:
    """The fields of a function in place of a custom tool, whose only argument is a text. A regular expression binds the
    text; a Lark grammar is shown to the model alone, and named as without effect. Chats have the grammar in an object
    of its own."""
    text: dict[str, Any] = {"type": "string"}
    description = tool.get("description") or ""
    form = tool.get("format")
    if isinstance(form, dict) and form.get("type") == "grammar":
        grammar = form.get("grammar", form)
        syntax, definition = map(grammar.get, ("syntax", "definition")) if isinstance(grammar, dict) else (None, None)
        if syntax not in ("lark", "regex") or not isinstance(definition, str):
            raise ValueError("format: a grammar must have a 'syntax' of lark or regex and a 'definition'")
        if syntax == "regex":
            text["pattern"] = f"^(?:{definition})$"
        else:
            leave_out("tools", "custom.format", context)
            description = f"{description}\n\nThe {TEXT_ARGUMENT} obeys this Lark grammar:\n{definition}".strip()
    schema = {"type": "object", "properties": {TEXT_ARGUMENT: text}, "required": [TEXT_ARGUMENT]}
    return {"name": tool.get("name"), "description": description, "parameters": schema}


def text_of_call(arguments: str) -> str:
    """The text of a custom tool's call. Arguments of another form, as of an answer that was cut, are the text."""
    given = (arguments_object(arguments) or {}).get(TEXT_ARGUMENT)
    return given if isinstance(given, str) else arguments


def arguments_of_text(text: str) -> str:
    """The arguments of the function that stands in place of a custom tool."""
    return json.dumps({TEXT_ARGUMENT: text}, ensure_ascii=False)


def call_id_of(choice_id: str, index: int, prefix: str = "call_") -> str:
    """Of a call that the model gave none: the same where a reply is computed again."""
    return f"{prefix}{sha256(f'{choice_id} {index}'.encode()).hexdigest()[:_ID_CHARACTERS]}"

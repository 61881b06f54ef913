"""Tools of the Responses API that its client runs, each as a function for the model. Hosted tools are left out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from llamaclust.cluster.front.fields.tools import (
    MAX_TOOLS,
    ClientTool,
    flat_name,
    function_tool,
    leave_out,
    text_tool,
)

_TEXT: Final = {"type": "string"}
_NUMBER: Final = {"type": "integer"}
_TEXTS: Final = {"type": "array", "items": _TEXT}
_HOSTED_ENVIRONMENTS: Final = ("container_auto", "container_reference")


@dataclass(frozen=True, slots=True)
class BuiltInTool:
    """A tool that clients know by its type alone. Its calls have the arguments in an object of their own."""

    field: str
    fixed: Mapping[str, Any]  # in that object
    description: str
    properties: Mapping[str, Any]
    required: tuple[str, ...]


BUILT_IN: Final = {
    "local_shell": BuiltInTool(
        "action",
        {"type": "exec", "command": [], "env": {}},
        "Runs a command on the user's machine.",
        {"command": _TEXTS, "working_directory": _TEXT, "timeout_ms": _NUMBER},
        ("command",),
    ),
    "shell": BuiltInTool(
        "action",
        {"commands": []},
        "Runs commands in a shell on the user's machine.",
        {"commands": _TEXTS, "timeout_ms": _NUMBER, "max_output_length": _NUMBER},
        ("commands",),
    ),
    "apply_patch": BuiltInTool(
        "operation",
        {"type": "update_file", "path": "", "diff": ""},
        "Creates, changes or deletes a file; `diff` is in the V4A format.",
        {"type": {"enum": ["create_file", "update_file", "delete_file"]}, "path": _TEXT, "diff": _TEXT},
        ("type", "path"),
    ),
}


@dataclass(frozen=True, slots=True)
class ToolSet:
    """The tools of a request."""

    client: tuple[ClientTool, ...] = ()
    shown: tuple[dict[str, Any], ...] = ()  # as the response repeats them


def read_tools(value: Any, context: object) -> ToolSet:
    """ValueError for a tool of a wrong form, and without a `Leniency` for a hosted one."""
    if not isinstance(value, list) or len(value) > MAX_TOOLS:
        raise ValueError(f"must be a list of at most {MAX_TOOLS} tools")
    client, shown = list[ClientTool](), list[dict[str, Any]]()
    for place, tool in enumerate(value):
        try:
            own = [*_tools(tool, None, context)]
        except ValueError as error:
            raise ValueError(f"[{place}]: {error}") from error
        client += own
        shown += [_shown(tool, own)] if own else []
        if len(client) > MAX_TOOLS:
            raise ValueError(f"[{place}]: more than {MAX_TOOLS} tools, those in namespaces included")
    return ToolSet(tuple(client), tuple(shown))


def _tools(tool: Any, namespace: str | None, context: object) -> Iterator[ClientTool]:
    kind = tool.get("type") if isinstance(tool, dict) else None
    if not isinstance(kind, str):
        raise ValueError("a tool must be an object with a 'type'")
    if kind == "namespace":
        name, tools = tool.get("name"), tool.get("tools")
        if not isinstance(name, str) or not isinstance(tools, list):
            raise ValueError("a namespace must have a 'name' and a list of 'tools'")
        if len(tools) > MAX_TOOLS:
            raise ValueError(f"{len(tools)} tools in a namespace, at most {MAX_TOOLS} are taken")
        for each in tools:
            yield from _tools(each, name, context)
    elif kind == "function":
        nested = tool.get("function")
        yield _named(kind, nested if isinstance(nested, dict) else tool, namespace)
    elif kind == "custom":
        yield _named(kind, text_tool(tool, context), namespace)
    elif kind in BUILT_IN and not _is_hosted(tool):
        built_in = BUILT_IN[kind]
        schema = {"type": "object", "properties": built_in.properties, "required": [*built_in.required]}
        fields = {"name": kind, "description": built_in.description, "parameters": schema}
        yield ClientTool(kind, kind, function_tool(fields))
    else:
        leave_out("tools", kind, context)


def _is_hosted(tool: Mapping[str, Any]) -> bool:
    """A shell may be in a container of OpenAI's."""
    environment = tool.get("environment")
    return isinstance(environment, dict) and environment.get("type") in _HOSTED_ENVIRONMENTS


def _named(kind: str, fields: Mapping[str, Any], namespace: str | None) -> ClientTool:
    function_tool(fields)  # its own name is checked too
    flat = function_tool({**fields, "name": flat_name(namespace, fields["name"])})
    return ClientTool(kind, fields["name"], flat, namespace)


def _shown(tool: dict[str, Any], own: list[ClientTool]) -> dict[str, Any]:
    """A function in full, in the flat form of this API; another tool as it was sent."""
    if tool["type"] != "function":
        return tool
    function = own[0].function["function"]
    fields = {name: function[name] for name in ("name", "description", "parameters")}
    return {"type": "function", **fields, "strict": False}

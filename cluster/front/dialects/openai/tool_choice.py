"""OpenAI's `tool_choice`: which tools an answer may or must call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from llamaclust.cluster.front.fields.function_tools import MAX_TOOLS, ClientTool
from llamaclust.cluster.front.text.chat import ToolMode, ToolUse
from llamaclust.core.errors import ParameterError

ALLOWED: Final = "allowed_tools"
MODES: Final = {"auto": ToolMode.AUTO, "none": ToolMode.NONE, "required": ToolMode.REQUIRED}


def read_choice(value: Any, example: str = '{"type": "function", "name": ...}') -> Any:
    """A mode, or an object in the form of the Responses API. ValueError, with an example of a named tool, for one of
    another form."""
    if isinstance(value, str) and value in MODES:
        return value
    if isinstance(value, dict) and value.get("type") == ALLOWED:
        return {"type": ALLOWED, "mode": _mode(value.get("mode")), "tools": _tools(value.get("tools"), example)}
    return _named_tool(value, f"must be 'none', 'auto', 'required', {example} or {ALLOWED}")


def _named_tool(value: Any, message: str) -> dict[str, str]:
    """The fields of a choice that name a tool."""
    kind = value.get("type") if isinstance(value, dict) else None
    names = {key: value[key] for key in ("type", "name", "namespace") if value.get(key) is not None} if kind else {}
    needs_name = kind in ("function", "custom")
    if not names or not all(isinstance(name, str) for name in names.values()) or (needs_name and "name" not in names):
        raise ValueError(message)
    return names


def _mode(value: Any) -> str:
    if value not in ("auto", "required"):
        raise ValueError("mode: must be 'auto' or 'required'")
    return str(value)


def _tools(value: Any, example: str) -> list[dict[str, str]]:
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_TOOLS:
        raise ValueError(f"tools: must be a list of 1 to {MAX_TOOLS} tools")
    return [_named_tool(tool, f"tools: each must be {example}") for tool in value]


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """A choice among the tools of a request."""

    choice: Any  # of `read_choice`
    tools: Sequence[ClientTool]
    is_parallel: bool | None  # None: one call where one is asked for

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
        """The functions that the answer may call."""
        tools = self.tools
        if isinstance(self.choice, dict) and self.choice["type"] == ALLOWED:
            tools = [tool for tool in tools if any(map(tool.is_named_by, self.choice["tools"]))]
        return tuple(tool.function for tool in tools)

    def check(self) -> None:
        """ParameterError for tools that contradict each other or the choice."""
        self._check_names()
        self.use.check(self.offered)

    def _check_names(self) -> None:
        """A tool that is demanded must be there; of those that are only allowed, hosted ones may be missing."""
        if not isinstance(self.choice, dict):
            return
        is_allowed = self.choice["type"] == ALLOWED
        for tool in self.choice["tools"] if is_allowed else [self.choice]:
            may_be_missing = is_allowed and tool["type"] not in ("function", "custom")
            if not may_be_missing and not any(each.is_named_by(tool) for each in self.tools):
                what = repr(tool.get("name", tool["type"])[:60])
                does = "allows" if is_allowed else "names"
                raise ParameterError("tool_choice", f"{does} {what}, which is not among the tools that can run here")

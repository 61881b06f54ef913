"""Messages and tools in the shape that a chat template takes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def template_variables(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Variables with the other forms in which templates ask for tools; without tools, `tools` is left out."""
    tools = variables.get("tools")
    if not tools:
        return {"functions": "", **{key: value for key, value in variables.items() if key != "tools"}}
    return {"functions": json.dumps([tool.get("function", tool) for tool in tools], indent=4), **variables}
